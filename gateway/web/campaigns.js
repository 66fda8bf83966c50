/** Campaigns of the tenant: a form that starts one, and how each goes on, in numbers that add up. */

import { $, CHANNELS, ask, element, notice } from "/page.js";

const MOVING_MS = 500; // between two looks at campaigns of which one is not over
const RESTING_MS = 5_000; // others may start one elsewhere
const SHOWN = 20;

/** All users of an audience are in exactly one of these. */
const PARTS = {
  dispatched: "in their logs",
  stored: "on the way",
  publishing: "being published",
  fixed: "waiting",
  excluded: "excluded",
  cancelled: "cancelled",
  expired: "too late",
  ambiguous: "of whom nobody can tell",
};

let turn = 0; // of all looks under way the last one counts
let timer;

/** How many users are in each part. The gateway counts what is dispatched as stored, too. */
const partsOf = (said) => Object.entries(PARTS).map(([name, text]) => [name, text, name === "stored" ? said.stored - said.dispatched : said[name]]);

const isOver = ({ finished_at: at }) => at !== null;

// --- the list -------------------------------------------------------------------------------------------------------

async function look() {
  const mine = ++turn;
  clearTimeout(timer);
  if ($("campaigns").hidden) return;
  let pause = RESTING_MS;
  try {
    const { items } = await ask("GET", `/v1/campaigns?limit=${SHOWN}`, { asService: true });
    if (mine !== turn) return;
    draw(items);
    notice("", $("campaigns-notice"));
    if (!items.every(isOver)) pause = MOVING_MS;
  } catch (error) {
    if (mine !== turn) return;
    notice(`Campaigns cannot be read: ${error.message}`, $("campaigns-notice"));
  }
  timer = setTimeout(look, pause);
}

/** Keeps the items that are there, so that the focus stays where it is. */
function draw(campaigns) {
  const known = new Map([...$("campaign-list").children].map((item) => [item.dataset.id, item]));
  const items = campaigns.map((said) => {
    const item = known.get(said.id) ?? itemOf(said);
    fill(item, said);
    return item;
  });
  const now = [...$("campaign-list").children];
  if (items.length !== now.length || items.some((item, index) => item !== now[index])) {
    const focused = document.activeElement;
    $("campaign-list").replaceChildren(...items);
    if (focused?.isConnected) focused.focus();
  }
  $("no-campaigns").hidden = items.length > 0;
}

function itemOf({ id }) {
  const button = (name) => element("button", { type: "button", class: "quiet", "data-do": name, "aria-label": `${name} ${id}` }, name);
  const item = element("li", { class: "campaign", "data-id": id, tabindex: "-1" },
    element("div", { class: "line" }, element("h3", {}, id), element("span", { class: "what" }), button("Pause"), button("Resume"), button("Cancel")),
    element("div", { class: "parts", role: "progressbar", "aria-label": `Progress of ${id}`, "aria-valuemin": 0 },
      ...Object.keys(PARTS).map((name) => element("i", { "data-part": name }))),
    element("p", { class: "sum" }),
    element("p", { class: "pace" }));
  for (const made of item.querySelectorAll("button")) made.addEventListener("click", () => change(id, made.dataset.do.toLowerCase()));
  return item;
}

function fill(item, said) {
  const parts = partsOf(said);
  const left = said.fixed + said.publishing;
  item.dataset.state = said.state;
  item.querySelector(".what").textContent = isOver(said) || said.state !== "cancelled" ? said.state : "ending";
  const bar = item.querySelector(".parts");
  for (const [name, , users] of parts) bar.querySelector(`[data-part=${name}]`).style.flexGrow = users;
  bar.classList.toggle("none", said.audience === 0);
  bar.setAttribute("aria-valuemax", said.audience);
  bar.setAttribute("aria-valuenow", said.audience - left);
  const sum = `${said.audience}${said.audience_final ? "" : "+"} users = `
    + (parts.filter(([, , users]) => users > 0).map(([, text, users]) => `${users} ${text}`).join(" + ") || "0");
  bar.setAttribute("aria-valuetext", sum);
  item.querySelector(".sum").textContent = sum;
  const addsUp = parts.reduce((total, [, , users]) => total + users, 0) === said.audience;
  item.querySelector(".pace").textContent = [
    addsUp ? "" : "These numbers do not add up!",
    isOver(said) ? `over since ${new Date(said.finished_at).toLocaleTimeString()}` : "",
    !isOver(said) && Date.parse(said.start_at) > Date.now() ? `starts at ${new Date(said.start_at).toLocaleString()}` : "",
    said.rate ? `at most ${said.rate} a second` : "",
    said.recipients_per_second && !isOver(said) ? `now ${said.recipients_per_second} a second` : "",
    said.seconds_left && !isOver(said) ? `${Math.ceil(said.seconds_left)} s left` : "",
    said.stuck ? `does not move: ${said.stuck}` : "",
  ].filter(Boolean).join(" · ");
  const offered = isOver(said) ? [] : { running: ["Pause", "Cancel"], paused: ["Resume", "Cancel"] }[said.state] ?? [];
  for (const button of item.querySelectorAll("button")) {
    const hide = !offered.includes(button.dataset.do);
    if (hide && !button.hidden && document.activeElement === button) item.focus();
    button.hidden = hide;
  }
}

async function change(id, what) {
  try {
    await ask("POST", `/v1/campaigns/${encodeURIComponent(id)}/${what}`, { asService: true });
    say("");
  } catch (error) {
    say(`${id}: cannot ${what}: ${error.message}`);
  }
  look();
}

// --- the form -------------------------------------------------------------------------------------------------------

const newName = () => `page-${new Date().toISOString().slice(0, 19).replace(/\D/g, "")}-${crypto.randomUUID().slice(0, 4)}`;

function drafted() {
  const topic = $("campaign-audience").value.replace(/^topic:/, "");
  const rate = $("campaign-rate").value;
  return {
    id: $("campaign-id").value.trim(),
    audience: topic ? { topic } : { everyone: true },
    message: { type: $("campaign-type").value.trim(), data: { title: $("campaign-title").value, body: $("campaign-body").value } },
    ...(rate ? { rate: Number(rate) } : {}),
  };
}

async function offerTopics() {
  const chosen = $("campaign-audience").value;
  try {
    const { items } = await ask("GET", "/v1/topics?limit=250", { asService: true });
    const topics = items.map(({ name, members }) => element("option", { value: `topic:${name}` }, `Topic ${name} (${members})`));
    $("campaign-audience").replaceChildren(element("option", { value: "" }, "Everyone in the directory"), ...topics);
    if ([...$("campaign-audience").options].some(({ value }) => value === chosen)) $("campaign-audience").value = chosen;
  } catch (error) {
    notice(`Topics cannot be read: ${error.message}`, $("campaigns-notice"));
  }
}

async function tryIt() {
  say("");
  try {
    const said = await ask("POST", "/v1/campaigns/dry-run", { asService: true, body: drafted() });
    const others = Object.entries(said.reasons).filter(([, users]) => users > 0).map(([why, users]) => `, ${users} ${why}`).join("");
    say(`Dry run: ${said.recipients} of ${said.audience} would get it${others}. Nothing was sent.`, decisionsOf(said));
  } catch (error) {
    say(`Not possible: ${error.message}`);
  }
}

/** What would be decided of each channel and why, with how many of the recipients that were looked at, most first. */
function decisionsOf({ decisions, sample, recipients }) {
  const whose = sample < recipients ? `of ${sample} drawn at random` : `of all ${sample}`;
  return Object.keys(CHANNELS).filter((channel) => decisions[channel]).map((channel) => {
    const counts = Object.entries(decisions[channel]).sort(([, one], [, other]) => other - one);
    const said = counts.map(([decision, users]) => `${users} ${decision}`).join(", ");
    return element("li", { "data-channel": channel }, element("b", {}, CHANNELS[channel]), `, ${whose}: ${said}`);
  });
}

/** What came of the last thing that was asked for; `decisions` are those of a dry run. */
function say(text, decisions = []) {
  $("campaign-said").textContent = text;
  $("campaign-decisions").replaceChildren(...decisions);
}

async function start() {
  const asked = drafted();
  try {
    const { created } = await ask("POST", "/v1/campaigns", { asService: true, body: asked });
    say(created ? `Started ${asked.id}` : `${asked.id} was started before`);
    if ($("campaign-id").value.trim() === asked.id) $("campaign-id").value = newName();
  } catch (error) { // the name stays: sent again, it changes nothing where it did arrive
    say(`Not started: ${error.message}`);
  }
  look();
}

$("campaigns").addEventListener("shown", () => {
  offerTopics();
  look();
});
$("campaign").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
$("dry-run").addEventListener("click", () => {
  if ($("campaign").reportValidity()) tryIt();
});
$("campaign-id").value = newName();
