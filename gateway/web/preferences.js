/** The user's preferences: what holds and who says so, choices, quiet hours. One change is one patch of one version. */

import { $, CHANNELS, ask, element, notice, user } from "/page.js";

const CHOICES = { "": "–", on: "on", off: "off", digest: "digest", instant: "instant" };
const INAPP_CHOICES = { "": "–", on: "on", off: "off" }; // the app cannot wait: a record is shown as soon as it is stored
const DAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
const DISTURBING = ["push", "email", "sms"]; // what quiet hours can silence
const NIGHT = { start: "22:00", end: "07:00" };
const SOURCES = {
  always: "nobody can switch it off",
  user_type: "your choice for the type",
  user_category: "your choice for the category",
  user_channel: "your choice for the channel",
  tenant_type: "the tenant's choice for the type",
  tenant_category: "the tenant's choice for the category",
  tenant_channel: "the tenant's choice for the channel",
  rule: "the type's rule",
  no_rule: "the type has no rule for it",
  user: "your choice",
  directory: "the directory",
  tenant: "the tenant",
  none: "nobody says",
};

let held = null; // what the gateway has answered last
let draft = {}; // the document as it stands in the form
let isSaving = false;

// --- documents, without the page ------------------------------------------------------------------------------------

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const bare = () => Object.create(null); // a category may be called like a member of every object

/** The patch (RFC 7396) that makes `after` of `before`. */
export function difference(before = {}, after = {}) {
  const patch = bare();
  for (const name of new Set([...Object.keys(before), ...Object.keys(after)])) {
    const [was, is] = [before[name], after[name]];
    if (is === undefined) patch[name] = null;
    else if (isObject(is) && isObject(was)) {
      const inner = difference(was, is);
      if (Object.keys(inner).length > 0) patch[name] = inner;
    } else if (JSON.stringify(was) !== JSON.stringify(is)) patch[name] = is;
  }
  return patch;
}

/** A document with a patch merged into it. */
export function merged(document, patch) {
  const result = Object.assign(bare(), document);
  for (const [name, value] of Object.entries(patch)) {
    if (value === null) delete result[name];
    else result[name] = isObject(value) ? merged(isObject(result[name]) ? result[name] : {}, value) : value;
  }
  return result;
}

/** What is left of a document when choices that say nothing, and lines without a choice, are taken out. */
function withoutEmptyLines(document) {
  const kept = Object.assign(bare(), document);
  for (const member of ["categories", "types"]) {
    const lines = Object.entries(document[member] ?? {}).filter(([, line]) => Object.keys(line).length > 0);
    delete kept[member];
    if (lines.length > 0) kept[member] = Object.assign(bare(), Object.fromEntries(lines));
  }
  if (Object.keys(kept.channels ?? {}).length === 0) delete kept.channels;
  return kept;
}

const changes = () => difference(held.document, draft);
const isChanged = () => Object.keys(changes()).length > 0;

// --- choices --------------------------------------------------------------------------------------------------------

/** The lines of the table: everything, each category, each type; of a type there is `effective`, too. */
function linesOf({ types }) {
  const categories = new Set([...types.map(({ category }) => category).filter(Boolean), ...Object.keys(draft.categories ?? {})]);
  const effective = new Map(types.map(({ type, channels }) => [type, channels]));
  const patterns = new Set([...effective.keys(), ...Object.keys(draft.types ?? {})]);
  return [
    { path: ["channels"], name: "Everything", kind: "" },
    ...[...categories].sort().map((name) => ({ path: ["categories", name], name, kind: "category" })),
    ...[...patterns].sort().map((name) => ({ path: ["types", name], name, kind: "type", effective: effective.get(name) })),
  ];
}

const at = (document, path) => path.reduce((inner, name) => inner?.[name], document);

function drawChoices() {
  const used = new Set(held.types.flatMap(({ channels }) => Object.keys(channels)));
  const channels = Object.keys(CHANNELS).filter((channel) => used.has(channel));
  $("choices").hidden = held.types.length === 0;
  $("no-types").hidden = held.types.length > 0;
  const head = element("tr", {}, element("th", { scope: "col" }, "For"), ...channels.map((one) => element("th", { scope: "col" }, CHANNELS[one])));
  $("choices").tHead.replaceChildren(head);
  $("choices").tBodies[0].replaceChildren(...linesOf(held).map((line) => element("tr", {},
    element("th", { scope: "row" }, element(line.kind ? "code" : "span", {}, line.name), line.kind && element("small", {}, ` ${line.kind}`), othersOf(line)),
    ...channels.map((channel) => cellOf(line, channel)))));
}

/** A line may have a choice for all channels that it does not name; only services and files write one. */
function othersOf({ path }) {
  const others = at(draft, path)?.["*"];
  return others ? element("small", {}, ` others: ${others}`) : null;
}

function cellOf({ path, name, effective }, channel) {
  const holds = effective?.[channel];
  const isOptional = path[0] !== "types" && held.types.some(({ channels }) => channels[channel] && channels[channel].source !== "always");
  const cell = element("td", { "data-label": CHANNELS[channel] });
  if (isOptional || (holds && holds.source !== "always")) cell.append(selectOf([...path, channel], `${name}: ${CHANNELS[channel]}`));
  if (holds) cell.append(element("p", { class: "holds", "data-choice": holds.choice, "data-source": holds.source },
    element("b", {}, holds.choice), ` ${SOURCES[holds.source] ?? holds.source}`));
  return cell;
}

function selectOf(path, label) {
  const made = element("select", { "aria-label": label, "data-path": path.join("/") },
    ...Object.entries(path.at(-1) === "inapp" ? INAPP_CHOICES : CHOICES).map(([value, text]) => element("option", { value }, text)));
  made.value = at(draft, path) ?? "";
  made.classList.toggle("edited", made.value !== (at(held.document, path) ?? ""));
  made.addEventListener("change", () => {
    const patch = path.reduceRight((inner, step) => Object.assign(bare(), { [step]: inner }), made.value || null);
    draft = withoutEmptyLines(merged(draft, patch));
    made.classList.toggle("edited", made.value !== (at(held.document, path) ?? ""));
    drawState();
  });
  return made;
}

// --- quiet hours ----------------------------------------------------------------------------------------------------

function drawQuietHours() {
  const own = draft.quiet_hours;
  $("quiet-mode").value = own === undefined ? "tenant" : own.windows?.length ? "own" : "none";
  $("quiet-own").hidden = $("quiet-mode").value !== "own";
  $("windows").replaceChildren(...(own?.windows ?? []).map(windowOf));
  for (const channel of DISTURBING) $(`quiet-${channel}`).checked = (own?.channels ?? DISTURBING).includes(channel);
  $("timezone").value = draft.timezone ?? "";
  $("timezone").placeholder = held.timezone.source === "user" ? "" : held.timezone.value ?? "UTC";
  const { value, source } = held.quiet_hours;
  const said = value?.windows?.length ? value.windows.map(windowInWords).join(", ") : "none";
  $("quiet-holds").textContent = `Now: ${said} (${SOURCES[source]}), in ${held.timezone.value ?? "UTC"} (${SOURCES[held.timezone.source]}).`;
}

const windowInWords = ({ start, end, days }) => `${start} to ${end} ${days && days.length < 7 ? days.join(" ") : "every day"}`;

function windowOf({ start, end, days = DAYS }, index) {
  const number = index + 1;
  const time = (name, value) => element("input", { type: "time", required: "", name, value, "aria-label": `Window ${number} ${name === "start" ? "from" : "to"}` });
  const boxes = DAYS.map((day) => {
    const box = element("input", { type: "checkbox", name: day });
    box.checked = days.includes(day);
    return element("label", {}, box, day);
  });
  const remove = element("button", { type: "button", class: "quiet", "aria-label": `Remove window ${number}` }, "Remove");
  remove.addEventListener("click", () => {
    made.remove();
    readQuietHours();
    drawQuietHours();
    ($("quiet-own").hidden ? $("quiet-mode") : $("add-window")).focus();
  });
  const made = element("li", { class: "window" }, time("start", start), "to", time("end", end),
    element("span", { class: "days", role: "group", "aria-label": `Window ${number} begins on` }, ...boxes), remove);
  return made;
}

/** Takes what stands in the form into the draft. */
function readQuietHours() {
  const mode = $("quiet-mode").value;
  const next = Object.assign(bare(), draft);
  delete next.quiet_hours;
  delete next.timezone;
  if (mode === "none") next.quiet_hours = {};
  if (mode === "own") {
    const windows = [...$("windows").children].map((item) => {
      const of = (name) => item.querySelector(`[name=${name}]`);
      const days = DAYS.filter((day) => of(day).checked);
      return { start: of("start").value, end: of("end").value, ...(days.length < DAYS.length ? { days } : {}) };
    });
    const channels = DISTURBING.filter((channel) => $(`quiet-${channel}`).checked);
    next.quiet_hours = windows.length === 0 ? {} : { windows, ...(channels.length < DISTURBING.length ? { channels } : {}) };
  }
  const timezone = $("timezone").value.trim();
  if (timezone) next.timezone = timezone;
  draft = next;
  drawState();
}

$("quiet-mode").addEventListener("change", () => {
  const { value } = held.quiet_hours;
  if ($("quiet-mode").value !== "own") readQuietHours();
  else draft = { ...draft, quiet_hours: value?.windows?.length ? value : { windows: [NIGHT] } };
  drawQuietHours();
  drawState();
});
$("add-window").addEventListener("click", () => {
  $("windows").append(windowOf(NIGHT, $("windows").children.length));
  readQuietHours();
});
for (const id of ["windows", "quiet-channels", "timezone"]) $(id).addEventListener("input", readQuietHours);

// --- reading and saving ---------------------------------------------------------------------------------------------

function show(document) {
  draft = document;
  drawChoices();
  drawQuietHours();
  $("document").textContent = JSON.stringify(held.document, null, 2);
  $("document-version").textContent = held.version;
  $("preferences-form").hidden = false;
  drawState();
}

function drawState() {
  const changed = isChanged();
  // Not `disabled`: the button that was just pressed would lose the focus.
  for (const id of ["save", "discard"]) $(id).setAttribute("aria-disabled", !changed || isSaving);
  if (changed) $("saved").textContent = "Not saved yet";
  else if ($("saved").textContent === "Not saved yet") $("saved").textContent = "";
}

async function load() {
  const own = held ? changes() : {};
  held = await ask("GET", "/v1/preferences");
  show(withoutEmptyLines(merged(held.document, own)));
}

async function reload() {
  try {
    await load();
    notice("", $("preferences-notice"));
  } catch (error) {
    notice(`Preferences cannot be read: ${error.message}`, $("preferences-notice"));
  }
}

async function save() {
  if (isSaving || !isChanged()) return;
  const [began, sent] = [held.version, draft];
  isSaving = true;
  drawState();
  $("saved").textContent = "Saving…";
  try {
    held = await ask("PATCH", `/v1/preferences?version=${began}`, { body: changes() });
    notice("", $("preferences-notice"));
    $("saved").textContent = "Saved: it holds within a second";
    isSaving = false;
    show(merged(held.document, difference(sent, draft))); // what was chosen while it was saved is kept
  } catch (error) {
    isSaving = false;
    drawState();
    if (error.code === "version_conflict") await meet(began);
    else notice(`Nothing was saved: ${error.message}`, $("preferences-notice"));
  }
}

/** Somebody was faster. What he has saved is shown, and what is changed here stays changed, for another look. */
async function meet(began) {
  try {
    await load();
    const said = `Nothing was saved: these preferences were changed elsewhere meanwhile (version ${held.version}; you began with ${began}).`;
    notice(`${said} What holds now is shown, with your own changes kept: look at them, and save again.`, $("preferences-notice"));
  } catch (error) {
    notice(`Nothing was saved: these preferences were changed elsewhere meanwhile, and cannot be read now: ${error.message}`, $("preferences-notice"));
  }
}

$("preferences").addEventListener("shown", reload);
$("preferences-form").addEventListener("submit", (event) => {
  event.preventDefault();
  save();
});
$("discard").addEventListener("click", () => { if (!isSaving) show(held.document); });
$("preferences-user").textContent = user;
$("zones").append(...(Intl.supportedValuesOf?.("timeZone") ?? []).map((zone) => element("option", { value: zone })));
