/** Why a notification goes where it goes: the plan that is stored of it, in words. */

import { CHANNELS, ask, element } from "/page.js";

const LOOKS = 20; // a planner decides within a second or two, and the projections show it soon after
const LOOK_MS = 700;

const WHYS = {
  default: "as nobody says otherwise",
  requested: "the event names this channel",
  critical: "critical goes by all channels",
  user_on: "you have switched it on",
  user_off: "you have switched the channel off",
  category_off: "you have switched the category off",
  type_off: "you have switched this type off",
  tenant_off: "the tenant has switched it off",
  quiet_hours: "your quiet hours",
  send_window: "outside the tenant's hours",
  digest: "together with others",
  escalation: "only if no device has shown it by then",
  no_rule: "the type has no rule for it",
  no_address: "there is no address of yours",
  no_token: "no device of yours takes pushes",
  no_template: "the type has no template for it",
  opted_out: "you have opted out",
  throttled: "too many in this time",
  cancelled: "it was cancelled",
  recalled: "it was recalled",
  expired: "it was over",
};

/** What is to be opened below a notification to see its plan. It looks a few times, as decisions come after the record. */
export function planOf(id) {
  const facts = element("ul");
  const made = element("details", { class: "plan" }, element("summary", {}, "Plan"), facts);
  let opened = 0; // whoever has closed it and opens it again begins anew
  made.addEventListener("toggle", async () => {
    const mine = ++opened;
    for (let look = 0; made.open && mine === opened && made.isConnected && look < LOOKS; look += 1) {
      const lines = await linesOf(id);
      if (mine === opened) facts.replaceChildren(...lines);
      await new Promise((resolve) => { setTimeout(resolve, LOOK_MS); });
    }
  });
  return made;
}

async function linesOf(id) {
  try {
    const { proofs } = await ask("GET", `/v1/notifications/${encodeURIComponent(id)}/trace`);
    const [proof] = proofs;
    // The planner's word comes after the record's, and counts.
    const planned = new Map(proof.facts.filter(({ fact }) => fact === "planned").map((fact) => [fact.channel, fact.detail]));
    return [
      ...[...planned].flatMap(([channel, detail]) => [lineOf(channel, detail), ...waysOf(proof, channel)]),
      ...(proof.trace_url ? [element("li", {}, element("a", { href: proof.trace_url, class: "trace" }, "Its way through all processes"))] : []),
      ...proof.not_proven.filter((what) => what.startsWith("sent")).map((what) => element("li", { class: "unproven" }, `Not proven: ${what}`)),
    ];
  } catch (error) {
    return [element("li", {}, error.code === "not_found" ? "Not decided yet…" : `Cannot be read: ${error.message}`)];
  }
}

function lineOf(channel, detail) {
  const [when, why = ""] = detail.split(", because: ");
  return element("li", { "data-channel": channel, "data-why": why },
    element("b", {}, CHANNELS[channel] ?? channel), ` ${inWords(when)}: ${WHYS[why] ?? why} `, element("code", {}, why));
}

/** What channels tell of it: by whom it was tried, how often, and what came of that. In the app devices tell it themselves. */
function waysOf(proof, channel) {
  if (channel === "inapp") return [];
  return proof.facts
    .filter((fact) => fact.channel === channel && fact.fact !== "planned")
    .map((fact) => element("li", { class: "way", "data-way": channel, "data-state": fact.fact },
      `${CHANNELS[channel] ?? channel}${fact.device ? ` (${fact.device})` : ""}: ${fact.fact}`,
      fact.detail ? `, ${fact.detail}` : "",
      fact.at ? `, ${new Date(fact.at).toLocaleTimeString()}` : ""));
}

function inWords(when) {
  const [kind, ...rest] = when.split(":");
  const value = rest.join(":");
  if (kind === "at") return `at ${new Date(value).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })}`;
  if (kind === "unless_seen") return `after ${value} s`;
  if (kind === "digest") return "in a digest";
  return kind === "never" ? "not sent" : kind;
}
