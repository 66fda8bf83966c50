/** The page of the dev profile. Its inbox is a small fold of one user's log, drawn. */

import { $, ask, element, notice, session, showView, user } from "/page.js";
import { planOf } from "/plan.js";
import { Seamark } from "/seamark.js";

const KEPT = 2_000; // notifications remembered; a page that stays open for weeks must not grow
const PAGE = 100; // as many as a snapshot has, so that a reload shows what was shown before
const CUT_CHARS = 500_000; // a gateway sends at most 1 MiB of rows: a snapshot of this size may be only part of a page
const HAPPENED = 8;

/** What the log says, folded: the same rules on every device, and in the gateway's inbox, give the same inbox. */
class Inbox {
  #rows = new Map(); // id → {id, seq, record, read}, oldest first
  #readIds = new Set(); // marks for records not seen (yet): a snapshot may lie between
  #readUpTo = 0;

  /** Begin with the rows of a snapshot, newest first. */
  clear(rows = []) {
    this.#rows.clear();
    this.#readIds.clear();
    this.#readUpTo = 0;
    this.older(rows);
  }

  /** Rows of a page of the inbox, newest first, before what is known. */
  older(rows) {
    const known = this.#rows;
    this.#rows = new Map(rows.filter(({ id }) => !known.has(id)).reverse().map((row) => [row.id, this.#made(row)]));
    for (const [id, one] of known) this.#rows.set(id, one);
    this.#bound();
  }

  /** Apply one record; gives the notification if it added one. */
  apply(seq, record) {
    if (record.kind === "read") return this.#read(record);
    if (record.kind === "recall" || record.kind === "archive") return this.#remove(record);
    return record.kind === "notification" ? this.#add(seq, record) : null;
  }

  /** What is to be shown now, newest first: what has expired is not. */
  get shown() {
    const now = Date.now();
    return [...this.#rows.values()].filter(({ record }) => !record.expires_at || Date.parse(record.expires_at) > now).reverse();
  }

  #made({ seq = 0, read = false, ...record }) {
    const isRead = read || seq <= this.#readUpTo || this.#readIds.has(record.id);
    return { id: record.id, seq, record, read: isRead };
  }

  #add(seq, record) {
    if (this.#rows.has(record.id)) return null;
    if (record.collapse_key) {
      for (const [id, one] of this.#rows) if (one.record.collapse_key === record.collapse_key) this.#rows.delete(id);
    }
    const one = this.#made({ ...record, seq });
    this.#rows.set(record.id, one);
    this.#bound();
    return one;
  }

  #bound() {
    while (this.#rows.size > KEPT) this.#rows.delete(this.#rows.keys().next().value);
  }

  #read({ ids = [], up_to: upTo }) {
    for (const id of ids) {
      const one = this.#rows.get(id);
      if (one) one.read = true;
      else if (this.#readIds.size < KEPT) this.#readIds.add(id);
    }
    if (upTo) {
      this.#readUpTo = Math.max(this.#readUpTo, upTo);
      for (const one of this.#rows.values()) if (covers(upTo, one)) one.read = true;
    }
    return null;
  }

  #remove({ ids = [], up_to: upTo }) {
    for (const id of ids) this.#rows.delete(id);
    if (upTo) for (const [id, one] of this.#rows) if (covers(upTo, one)) this.#rows.delete(id);
    return null;
  }
}

/** Rows that a rebuild carried over stand before everything the log has: their sequence is of a former log. */
const covers = (upTo, { seq, record }) => record.carried === true || seq <= upTo;

const inbox = new Inbox();
let received = 0;
let drawing = false;
let waitingUntil = 0;
let limit = PAGE; // rows shown
let isCut = false; // the snapshot has fewer rows than a page, as they are large
let next; // the gateway's page behind what is known: undefined before the first is asked for, null behind the last

async function token() {
  const { token: made, api_key: key, command, outbox_url: outbox } = await session();
  $("publish-card").hidden = $("to-campaigns").hidden = !key;
  $("to-outbox").hidden = !outbox;
  if (outbox) $("to-outbox").href = `${outbox}/?user=${encodeURIComponent(user)}`;
  showCommand(command);
  return made;
}

const seamark = new Seamark({ token });
window.seamark = seamark; // for the console

// --- drawing --------------------------------------------------------------------------------------------------------

/** Draws soon, once for many records. A timer, not a frame callback: those stand still in a tab behind. */
function draw() {
  if (drawing) return;
  drawing = true;
  setTimeout(() => { drawing = false; drawNow(); }, 16);
}

function drawNow() {
  const all = inbox.shown;
  const unread = all.filter((one) => !one.read).length;
  drawList(all.slice(0, limit));
  $("older").hidden = all.length <= limit && (next === null || (all.length < PAGE && !isCut));
  $("empty").hidden = all.length > 0 || seamark.state !== "live";
  // The projections' count knows of what this page has not loaded; a stale one may know less than the page.
  const told = seamark.unread && !seamark.unread.stale ? seamark.unread : { count: unread, more: false };
  const counted = told.more ? `${told.count}+` : told.count;
  $("badge").hidden = !counted;
  $("badge").textContent = counted;
  $("badge").setAttribute("aria-label", told.more ? `more than ${told.count} unread` : `${counted} unread`);
  $("read-all").disabled = !counted && unread === 0;
  document.title = `${counted ? `(${counted}) ` : ""}Inbox · Seamark`;
  $("cursor").textContent = seamark.cursor ?? "none yet";
  $("received").textContent = received;
}

/** Keeps the items that are there, so that focus and selection stay where they are. */
function drawList(shown) {
  const list = $("list");
  const held = new Map([...list.children].map((item) => [item.dataset.id, item]));
  let before = list.firstElementChild;
  for (const one of shown) {
    let item = held.get(one.id);
    held.delete(one.id);
    if (item && item.one !== one) {
      const fresh = draft(one);
      item.replaceWith(fresh);
      if (before === item) before = fresh;
      item = fresh;
    }
    item ??= draft(one);
    if (item === before) before = before.nextElementSibling;
    else list.insertBefore(item, before);
    item.classList.toggle("unread", !one.read);
    drawButton(item, one);
    item.querySelector(".dot").textContent = one.read ? "" : "Unread";
  }
  for (const item of held.values()) item.remove();
}

/** The button says that a mark waits until the log shows it. Then the button goes, and the focus moves to the next one. */
function drawButton(item, one) {
  const button = item.querySelector("button.read");
  if (!button) return;
  const waits = seamark.marks.ids.has(one.id);
  button.textContent = waits ? "Waiting…" : "Mark read";
  button.setAttribute("aria-disabled", waits);
  if (!one.read) return;
  if (document.activeElement === button) {
    const others = [...$("list").querySelectorAll("button.read")];
    const at = others.indexOf(button);
    (others[at + 1] ?? others[at - 1] ?? $("inbox")).focus();
  }
  button.remove();
}

function titleOf({ data, type }) {
  const said = data && typeof data === "object" ? data.title ?? data.text ?? data.message : data;
  return said === undefined || said === null || said === "" ? type : String(said);
}

function draft(one) {
  const { record, seq, id } = one;
  const at = new Date(record.at);
  const today = at.toDateString() === new Date().toDateString();
  const time = element("time", { datetime: record.at, title: at.toLocaleString() },
    today ? at.toLocaleTimeString() : at.toLocaleString([], { dateStyle: "medium", timeStyle: "short" }));
  const read = element("button", { type: "button", class: "read quiet", "aria-label": `Mark read: ${titleOf(record)}` }, "Mark read");
  read.addEventListener("click", () => {
    seamark.read({ ids: [id] });
    draw();
  });
  const body = typeof record.data === "object" && record.data && typeof record.data.body === "string" ? record.data.body : null;
  const item = element("li", { "data-id": id, "data-seq": seq, class: "item" },
    element("span", { class: "dot" }),
    element("div", { class: "what" },
      element("h3", {}, titleOf(record)),
      body && element("p", {}, body),
      element("p", { class: "meta" }, element("span", { class: "type" }, record.type ?? record.kind), time,
        element("code", { title: "sequence in the log" }, `#${seq}`),
        record.priority && record.priority !== "normal" ? element("span", { class: `priority ${record.priority}` }, record.priority) : null),
      planOf(id),
    ),
    read);
  item.one = one;
  return item;
}

const STATES = { "connecting": "Connecting…", "catching-up": "Catching up…", "live": "Live", "closed": "Cut" };

function drawState({ state, reason, retryMs, transport }) {
  $("state").dataset.state = state;
  waitingUntil = retryMs === null ? 0 : Date.now() + retryMs;
  $("state").lastElementChild.textContent = STATES[state] ?? "Reconnecting…";
  $("state").title = reason;
  if (transport) $("transport").textContent = transport === "sse" ? "server-sent events" : "WebSocket";
  else $("transport").textContent = "–";
  $("cut").disabled = false;
  $("cut").textContent = state === "closed" ? "Restore connection" : "Cut connection";
  if (state === "waiting") happened(`${reason}; trying again in ${(retryMs / 1000).toFixed(1)} s`);
  if (state === "closed") happened(reason);
  draw();
}

function happened(text) {
  const now = new Date();
  $("happened").prepend(element("li", {}, element("time", { datetime: now.toISOString() }, now.toLocaleTimeString()), ` ${text}`));
  while ($("happened").children.length > HAPPENED) $("happened").lastElementChild.remove();
}

/** The command that publishes to this user, as a shell takes it. */
function showCommand(command) {
  const quoted = /^[\w@.+-]+$/.test(user) ? user : `'${user.replace(/'/g, "'\\''")}'`;
  $("command").textContent = `${command} --to ${quoted} --type demo.hello --data '{"text":"hi"}'`;
}

// --- the log --------------------------------------------------------------------------------------------------------

const GAPS = ["epoch", "future", "trimmed"]; // resets that the user should know about

seamark.addEventListener("record", ({ detail: { seq, record } }) => {
  received += 1;
  const added = inbox.apply(seq, record);
  if (added && seamark.state === "live") $("announce").textContent = `New notification: ${titleOf(record)}`;
  draw();
});
seamark.addEventListener("reset", ({ detail: { reason, inbox: rows } }) => {
  inbox.clear(rows);
  [limit, next] = [PAGE, undefined];
  isCut = rows.length < PAGE && JSON.stringify(rows).length > CUT_CHARS;
  happened(reason === "snapshot" ? `began with a snapshot of ${rows.length}` : `reset: ${reason}`);
  if (GAPS.includes(reason)) notice(`The log could not be continued (${reason}). What follows is a fresh copy.`);
  draw();
});
seamark.addEventListener("live", ({ detail: { cursor } }) => { happened(`live at ${cursor}`); draw(); });
seamark.addEventListener("unread", draw);
seamark.addEventListener("state", ({ detail }) => drawState(detail));
seamark.addEventListener("error", ({ detail: { code, message, fatal } }) => {
  if (fatal) notice(`Connection ended: ${message} (${code}).`);
  else happened(`${code}: ${message}`);
});

// --- controls -------------------------------------------------------------------------------------------------------

$("cut").addEventListener("click", () => {
  notice("");
  if (seamark.running) seamark.close();
  else seamark.connect();
});
$("read-all").addEventListener("click", () => seamark.read({ all: true }));
$("older").addEventListener("click", async () => {
  limit += PAGE;
  try {
    while (next !== null && inbox.shown.length < limit) await loadOlder();
  } catch (error) {
    notice(`Older notifications cannot be read: ${error.message}`);
  }
  draw();
});
$("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText($("command").textContent);
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
});
$("who").addEventListener("submit", (event) => {
  event.preventDefault();
  location.search = new URLSearchParams({ user: $("user").value.trim() });
});

async function loadOlder() {
  const query = next ? `?cursor=${encodeURIComponent(next)}` : "";
  const answer = await ask("GET", `/v1/inbox${query}`);
  inbox.older(answer.items);
  next = answer.next;
}

async function publish(text) {
  const to = $("to").value.split(",").map((one) => one.trim()).filter(Boolean);
  const by = [...document.querySelectorAll("#by input:checked")].map((one) => one.value);
  const channels = by.length ? ["inapp", ...by] : undefined; // none chosen: the rule of the type says
  const body = { to, type: $("type").value.trim(), data: { text }, channels };
  const headers = { "Idempotency-Key": `page-${crypto.randomUUID()}` };
  return (await ask("POST", "/v1/events", { body, headers, asService: true })).event_id;
}

async function publishAll(texts) {
  try {
    let last = "";
    for (const text of texts) last = await publish(text);
    $("published").textContent = texts.length === 1 ? `Stored as ${last}` : `Stored ${texts.length} events`;
  } catch (error) {
    $("published").textContent = `Not published: ${error.message}`;
  }
}

$("publish").addEventListener("submit", (event) => {
  event.preventDefault();
  publishAll([$("text").value]);
});
$("five").addEventListener("click", () => {
  if ($("publish").reportValidity()) publishAll([1, 2, 3, 4, 5].map((number) => `${$("text").value} (${number})`));
});

setInterval(draw, 10_000); // expired notifications leave even while nothing new comes

setInterval(() => {
  const left = waitingUntil - Date.now();
  if (left > 500) $("state").lastElementChild.textContent = `Reconnecting in ${Math.ceil(left / 1000)} s`;
}, 500);

$("user").value = $("to").value = user;
$("empty-user").textContent = user;
$("device").textContent = seamark.device;
seamark.connect();
addEventListener("hashchange", showView);
showView();
