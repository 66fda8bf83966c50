/** The outbox of `seamark dev`: what each channel's provider accepted, as the person sees it. Everything is set as text, never as HTML. */

const $ = (id) => document.getElementById(id);
const CHANNELS = { push: "Push", email: "E-mail", sms: "SMS", webhook: "Webhook" };
const FAULTS = {
  throttled: ["429", "Too many requests, again in 5 seconds"],
  unavailable: ["503", "Service unavailable"],
  hang: ["Hang", "No answer"],
  reset: ["Reset", "The connection breaks off"],
  late: ["Late", "The answer takes 3 seconds"],
  gone: ["Gone", "There is no such token, address or endpoint"],
};
const MAIL_WORDS = {
  delivered: ["Delivered", "SendGrid reports that the recipient's server has it"],
  bounced: ["Bounce", "SendGrid reports 5.1.1: the address is nobody's, and gets no more mails"],
  complained: ["Complaint", "The reader calls it spam, and gets no more mails"],
};
const TEXT_WORDS = {
  delivered: ["Delivered", "Twilio reports that the phone has it"],
  undelivered: ["Phone is off", "Twilio reports 30003: the phone cannot be reached"],
  invalid: ["Nobody's number", "Twilio reports 30005: the number gets no more texts"],
  stop: ["Answer STOP", "The person wants no more texts"],
  start: ["Answer START", "The person wants texts again"],
};
const UNITS = { "gsm-7": [160, 153], "ucs-2": [70, 67] };
const BANNERS = 6; // as many as fit on a phone

const asked = new URLSearchParams(location.search);
let channel = asked.get("channel") in CHANNELS ? asked.get("channel") : "";
let user = asked.get("user") ?? "";
let device = "";
let pushes = [];
let newest = 0;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const time = (at) => new Date(at).toLocaleTimeString([], { hour12: false });

/** A link where it is one that a browser may open: what stands in data may be anything. */
function link(url) {
  const isWeb = /^https?:\/\//i.test(url);
  return isWeb ? element("a", { href: url, rel: "noreferrer noopener", target: "_blank" }, url) : element("span", {}, url);
}

function raw(title, value) {
  return element("details", { class: "plan" }, element("summary", {}, title), element("pre", {}, element("code", {}, JSON.stringify(value, null, 2))));
}

// --- one message, by its channel ------------------------------------------------------------------------------------

const parts = {
  push({ shown, provider, raw: request }) {
    return [
      element("div", { class: "banner" },
        element("img", { src: "/favicon.svg", alt: "", width: "34", height: "34" }),
        element("div", {},
          shown.title ? element("h3", {}, shown.title) : null,
          shown.body ? element("p", {}, shown.body) : null),
        shown.badge === null ? null : element("b", { class: "count", title: "Badge at the app's icon" }, String(shown.badge))),
      shown.url ? element("p", { class: "url" }, link(shown.url)) : null,
      raw(`What ${provider} got`, request),
    ];
  },

  email(message) {
    const { shown, number, provider } = message;
    const html = shown.html
      ? element("iframe", { sandbox: "", src: `/messages/${number}/html`, title: `The mail “${shown.subject}”`, loading: "lazy", referrerpolicy: "no-referrer" })
      : null;
    const text = element("pre", { class: "text" }, shown.text);
    const headers = element("dl", { class: "headers" },
      ...Object.entries(shown.headers).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
    const views = [["HTML", html], ["Text", text], ["Headers", headers]].filter(([, view]) => view);
    return [
      element("h3", { class: "subject" }, shown.subject),
      element("p", { class: "from" }, shown.from),
      tabs(views, `Views of the mail “${shown.subject}”`),
      ...views.map(([, view]) => view),
      provider === "SendGrid" ? telling(number, MAIL_WORDS) : null,
    ];
  },

  sms({ shown, number, provider }) {
    const count = shown.segments.length;
    const units = [...shown.segments].map((segment) => element("span", {}, segment));
    const [single, several] = UNITS[shown.encoding];
    const each = `${count === 1 ? single : several} characters each`;
    return [
      element("div", { class: "bubble" }, ...units),
      element("p", { class: "meta" }, `${count} segment${count === 1 ? "" : "s"} · ${shown.encoding.toUpperCase()} · at most ${each}`,
        shown.from ? ` · from ${shown.from}` : ""),
      provider === "Twilio" ? telling(number, TEXT_WORDS) : null,
    ];
  },

  webhook({ shown, verified, raw: request, to }) {
    const why = verified ? "Signature verified" : `Refused: ${shown.why}`;
    return [
      element("p", { class: verified ? "good" : "bad" }, why, " ", element("code", {}, `POST ${to}`)),
      element("pre", { class: "text" }, element("code", {}, JSON.stringify(shown.body, null, 2))),
      raw("Headers", request),
    ];
  },
};

/** Buttons by which a provider tells the gateway what has become of a message, or what the person answers. */
function telling(number, words) {
  const said = element("span", { role: "status" });
  const buttons = Object.entries(words).map(([word, [short, long]]) => {
    const button = element("button", { type: "button", class: "quiet", title: long, "data-tell": word }, short);
    button.addEventListener("click", async () => {
      try {
        await ask("POST", `/messages/${number}/tell`, { tell: word });
        said.textContent = `Told: ${short}`;
      } catch (error) {
        said.textContent = error.message;
      }
    });
    return button;
  });
  return element("div", { class: "tabs", role: "group", "aria-label": "What becomes of it" }, ...buttons, said);
}

function tabs(views, label) {
  const buttons = views.map(([name, view], index) => {
    const button = element("button", { type: "button", class: "quiet", "aria-pressed": String(index === 0) }, name);
    view.hidden = index > 0;
    button.addEventListener("click", () => {
      for (const [at, [, other]] of views.entries()) {
        other.hidden = other !== view;
        buttons[at].setAttribute("aria-pressed", String(other === view));
      }
    });
    return button;
  });
  return element("div", { class: "tabs", role: "group", "aria-label": label }, ...buttons);
}

function item(message) {
  const to = message.channel === "push" ? message.device || message.to : message.to;
  return element("li", { class: "message", "data-number": String(message.number), "data-channel": message.channel, "data-user": message.user },
    element("p", { class: "meta" },
      element("span", { class: "type" }, CHANNELS[message.channel]),
      element("b", {}, message.user || "nobody known"),
      message.channel === "webhook" ? null : element("span", { class: "to" }, to),
      element("span", {}, message.provider),
      element("time", { datetime: message.at }, time(message.at))),
    ...parts[message.channel](message).filter((part) => part !== null));
}

// --- drawing --------------------------------------------------------------------------------------------------------

/** Keeps the items that are there: a mail must not load anew, and what is open stays open. */
function drawList(messages) {
  const list = $("list");
  const held = new Map([...list.children].map((one) => [one.dataset.number, one]));
  let before = list.firstElementChild;
  for (const message of messages) {
    let one = held.get(String(message.number));
    held.delete(String(message.number));
    if (one && one.dataset.user !== message.user) { one.replaceWith(one = item(message)); if (before && !before.isConnected) before = one; }
    if (!one) one = item(message);
    if (one === before) before = one.nextElementSibling;
    else list.insertBefore(one, before);
  }
  for (const gone of held.values()) gone.remove();
}

/** The phone of the user whose messages are shown, else of whoever got the last push. */
function drawPhone() {
  const owner = user || pushes[0]?.user || "";
  const theirs = pushes.filter((one) => one.user === owner);
  const inOrder = theirs.toSorted((one, other) => one.provider.localeCompare(other.provider)); // APNs, FCM, Web Push
  const names = [...new Set(inOrder.map((one) => one.device || one.provider))];
  $("handset").hidden = !theirs.length;
  if (!theirs.length) return;
  const chosen = names.includes(device) ? device : names[0];
  $("owner").textContent = owner || "nobody known";
  $("devices").replaceChildren(...names.map((name) => {
    const button = element("button", { type: "button", "aria-pressed": String(name === chosen) }, name);
    button.addEventListener("click", () => { device = name; drawPhone(); });
    return button;
  }));
  const mine = theirs.filter((one) => (one.device || one.provider) === chosen);
  const places = new Set();
  const standing = mine.filter(({ shown }) => !places.has(shown.replaces) && places.add(shown.replaces));
  $("banners").replaceChildren(...standing.slice(0, BANNERS).map(({ shown, at }) => element("li", {},
    element("h3", {}, shown.title || "The app"), element("time", { datetime: at }, time(at)), element("p", {}, shown.body))));
  const badge = mine.find(({ shown }) => shown.badge !== null)?.shown.badge;
  $("badge").hidden = !badge;
  $("badge").textContent = badge ?? "";
  $("badge").setAttribute("aria-label", `${badge} unread`);
}

function drawFaults(standing) {
  for (const button of document.querySelectorAll("#faults button")) {
    button.setAttribute("aria-pressed", String(standing[button.dataset.of] === button.dataset.fault));
  }
  const said = Object.entries(standing).map(([name, fault]) => `${CHANNELS[name]}: ${FAULTS[fault][1].toLowerCase()}`);
  $("faulty").hidden = !said.length;
  $("faulty").textContent = said.length ? `Switched on – ${said.join("; ")}.` : "";
}

function drawUsers(users) {
  const named = user && !users.includes(user) ? [...users, user].sort() : users;
  const wanted = ["", ...named];
  if (wanted.join("\n") === [...$("user").options].map((one) => one.value).join("\n")) return;
  $("user").replaceChildren(...wanted.map((one) => element("option", { value: one }, one || "everybody")));
  $("user").value = user;
}

function draw(answer) {
  drawList(answer.messages);
  drawUsers(answer.users);
  drawFaults(answer.faults);
  $("to-inbox").hidden = !answer.inbox_url;
  $("to-inbox").href = `${answer.inbox_url}/?${query({ user })}`;
  $("count").hidden = !answer.found;
  $("count").textContent = answer.found;
  $("clear").disabled = !answer.found;
  $("empty").hidden = answer.found > 0;
  const left = answer.found - answer.messages.length;
  $("more").hidden = left <= 0;
  $("more").textContent = left > 0 ? `${left} older ones: GET /messages?limit=${answer.found}` : "";
  const last = answer.messages[0]?.number ?? 0;
  if (last > newest && newest) $("announce").textContent = `${CHANNELS[answer.messages[0].channel]} to ${answer.messages[0].user}`;
  newest = Math.max(newest, last);
  for (const button of $("channels").children) {
    if (button.dataset.channel === channel) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

// --- asking ---------------------------------------------------------------------------------------------------------

async function ask(method, path, body) {
  const response = await fetch(path, {
    method,
    cache: "no-store",
    headers: body === undefined ? {} : { "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
    signal: AbortSignal.timeout(20_000),
  });
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

const query = (members) => new URLSearchParams(Object.entries(members).filter(([, value]) => value)).toString();

let looking = false;
let again = false;

/** One look at a time; what changes meanwhile is seen by another one after it. */
async function look() {
  if (looking) { again = true; return; }
  looking = true;
  do {
    again = false;
    try {
      draw(await ask("GET", `/messages?${query({ channel, user })}`));
      pushes = (await ask("GET", `/messages?${query({ channel: "push", user })}`)).messages;
      drawPhone();
      $("notice").hidden = true;
    } catch (error) {
      $("notice").hidden = false;
      $("notice").textContent = `The outbox cannot be read: ${error.message}`;
    }
  } while (again);
  looking = false;
}

function choose() {
  history.replaceState(null, "", `?${query({ channel, user })}`);
  look();
}

for (const [name, title] of Object.entries(CHANNELS)) {
  $("faults").append(element("fieldset", {}, element("legend", {}, title), ...Object.entries(FAULTS).map(([fault, [short, long]]) => {
    const button = element("button", { type: "button", class: "quiet", title: long, "aria-label": `${title}: ${long}`, "aria-pressed": "false", "data-of": name, "data-fault": fault }, short);
    button.addEventListener("click", async () => {
      const isOn = button.getAttribute("aria-pressed") === "true";
      try {
        drawFaults(await ask("PUT", `/faults/${name}`, { fault: isOn ? null : fault }));
      } catch (error) {
        $("notice").hidden = false;
        $("notice").textContent = `The fault is as it was: ${error.message}`;
      }
    });
    return button;
  })));
}

$("channels").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) { channel = button.dataset.channel; choose(); }
});
$("user").addEventListener("change", () => { user = $("user").value; choose(); });
$("clear").addEventListener("click", async () => {
  await ask("DELETE", "/messages").catch(() => null);
  look();
});

function showState(state, text) {
  $("state").dataset.state = state;
  $("state").lastElementChild.textContent = text;
}

const changes = new EventSource("/changes");
changes.addEventListener("open", () => showState("live", "Live"));
changes.addEventListener("error", () => showState("connecting", "Reconnecting…"));
changes.addEventListener("message", look);

const tick = () => { $("clock").textContent = new Date().toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false }); };
tick();
setInterval(tick, 5_000);
