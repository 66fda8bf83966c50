/** What the parts of the page share: its elements, its three views, the session, and requests to the gateway. */

const SPARE_MS = 30_000; // a token or key that ends sooner is not used for a new request
const ASK_MS = 20_000;
const JSON_BODY = { "Content-Type": "application/json" };
const VIEWS = ["inbox", "preferences", "campaigns"];

export const CHANNELS = { inapp: "In the app", push: "Push", email: "E-mail", sms: "SMS", webhook: "Webhook" };

export const $ = (id) => document.getElementById(id);
export const user = new URLSearchParams(location.search).get("user") || "alice";

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function notice(text, place = $("notice")) {
  place.hidden = !text;
  place.textContent = text;
}

// --- the session ----------------------------------------------------------------------------------------------------

let held = null;

/** A new session: the user's `token`, the page's `api_key` (null: it has none), the `command` that publishes. */
export async function session() {
  const response = await fetch(`/dev/session?user=${encodeURIComponent(user)}`, { cache: "no-store" });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.detail ?? `answered with ${response.status}`);
  held = answer;
  return held;
}

/** The gateway has said no. `code`: the problem's word. */
export class Refused extends Error {
  constructor(status, { code = "", detail }) {
    super(detail ?? `answered with ${status}`);
    this.code = code;
  }
}

/** Asks the gateway as the user or, `asService`, with the page's key; gives the body of the answer. */
export async function ask(method, path, { body, asService = false, headers = {} } = {}) {
  const isFresh = held && held.expires_at * 1000 > Date.now() + SPARE_MS;
  const send = ({ token, api_key: key }) => fetch(path, {
    method,
    cache: "no-store",
    signal: AbortSignal.timeout(ASK_MS),
    headers: { Authorization: `Bearer ${asService ? key : token}`, ...(body === undefined ? {} : JSON_BODY), ...headers },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  let response = await send(isFresh ? held : await session());
  if (response.status === 401) response = await send(await session()); // the user was signed out meanwhile
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refused(response.status, answer);
  return answer;
}

// --- the views ------------------------------------------------------------------------------------------------------

let shown = VIEWS[0];

/** Shows the view that the address names; its section hears of it by the event `shown`. Other anchors are jumps within a view. */
export function showView() {
  const asked = location.hash.slice(1);
  if (VIEWS.includes(asked) || asked === "") shown = asked || VIEWS[0];
  for (const name of VIEWS) {
    $(name).hidden = name !== shown;
    if (name === shown) $(`to-${name}`).setAttribute("aria-current", "page");
    else $(`to-${name}`).removeAttribute("aria-current");
  }
  if (asked === shown) $(shown).dispatchEvent(new Event("shown"));
}
