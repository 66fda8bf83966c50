/**
 * Seamark for browsers: follow a user's log. One ES module, no dependencies, no build step.
 *
 *   const inbox = new Seamark({ token: () => fetch("/my/token").then((r) => r.text()) });
 *   inbox.addEventListener("record", ({ detail }) => show(detail.record));
 *   inbox.addEventListener("reset", ({ detail }) => replaceAll(detail.inbox));
 *   inbox.connect();
 *
 * Events (all `CustomEvent`): `record` {seq, prev, cursor, record} · `reset` {reason, cursor, unread, inbox} ·
 * `live` {cursor} · `unread` {count, as_of, stale} · `state` {state, transport, reason, retryMs} ·
 * `error` {code, message, fatal}.
 *
 * Records come in log order, each once per page. The position lives in memory, so that two tabs never disturb each
 * other; localStorage gets a copy after the listeners ran, and is read only to begin with. WebSocket first; where that
 * fails twice without opening, server-sent events read with `fetch`.
 */

const PROTOCOL = "seamark.v1";
const TIMES = {
  backoffFirst: 500, // upper bound of the first wait; doubles, with full jitter
  backoffMax: 30_000,
  connect: 10_000, // for a handshake, and for `ready`
  ping: 20_000, // a `ping` is sent this often; a proxy that drops idle connections sees traffic
  silence: 50_000, // nothing at all received for so long: the way is dead
  ack: 250, // at most one ack in this time, as the protocol asks
  probe: 5_000, // for an answer when the page comes back to the front or the network returns
  store: 1_000, // at most one write to localStorage in this time
  stream: 300_000, // a fall-back session ends itself after this: the next attempt is a WebSocket again
  tooMany: 60_000, // after 4429
};
const READ_IDS = 200; // ids in one frame: well below the 64 KiB a gateway accepts
const READ_IDS_WAITING = 1_000; // ids marked while no session stands; more is refused with an error event
const STOP = {
  1009: "a frame was too large", 4400: "the gateway did not understand this client", 4403: "not allowed",
  4409: "another session of this user took the place of this one", 4413: "a frame was too large",
};
const CHAIN_BROKEN = 4000; // what this client closes with when it resumes because of what it received

/** The two parts of a cursor, for the checks below; apps store it whole. Null if it is none. */
function parseCursor(text) {
  const found = /^([a-z0-9]{1,32})\.(0|[1-9]\d{0,15})$/.exec(text ?? "");
  return found && { epoch: found[1], seq: Number(found[2]) };
}

function claimsOf(token) {
  try {
    const payload = token.split(".")[1].replace(/-/g, "+").replace(/_/g, "/");
    return JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(payload), (c) => c.charCodeAt(0))));
  } catch {
    return {}; // an opaque token: no expiry to plan by, no name for the storage
  }
}

/**
 * The receive rules, without I/O: `on(frame)` gives [what, value]. One position is held: the last cursor accepted. The
 * `prev` of the next record must equal its sequence, a record at or below it is a duplicate.
 */
export class Receiver {
  constructor(cursor = null) {
    this.position = cursor; // "start" until a session has answered
    this.connected();
  }

  connected() {
    this.joined = this.anchored = false;
  }

  on(frame) {
    const { op } = frame;
    if (op === "ready") return this.#ready(frame);
    if (!["record", "skip", "live", "pong", "reset"].includes(op)) return [op, frame];
    if (!this.joined) return ["restart", "a frame of the log came before `ready`"];
    const at = parseCursor(frame.cursor);
    if (op === "pong" && ((frame.cursor ?? null) === null || !this.anchored)) return ["drop", "pong"];
    if (!at) return ["restart", "bad cursor in a frame"];
    if (op === "reset") {
      this.anchored = true;
      this.position = frame.cursor;
      return ["reset", frame];
    }
    if (!this.anchored) return ["restart", "the log went on before its reset"];
    const held = parseCursor(this.position);
    if (at.epoch !== held.epoch) return ["restart", "the epoch changed without a reset"];
    if (op === "live" || op === "pong") {
      if (at.seq < held.seq) return op === "live" ? ["restart", "`live` lies behind what was sent"] : ["drop", "pong"];
    } else {
      if (at.seq !== frame.seq) return ["restart", "cursor and sequence differ"];
      if (at.seq <= held.seq) return ["drop", "duplicate"];
      if (frame.prev !== held.seq) return ["restart", `${frame.seq} follows ${frame.prev}, but ${held.seq} is held`];
    }
    this.position = frame.cursor;
    return op === "record" || op === "live" ? [op, frame] : ["advance", frame.cursor];
  }

  #ready(frame) {
    if (this.joined) return ["restart", "a second `ready`"];
    if (frame.resumed) {
      if (!parseCursor(frame.cursor)) return ["restart", "`ready` without a cursor"];
      const asked = this.position;
      if (asked && asked !== "start" && asked !== frame.cursor) return ["restart", "resumed from another cursor"];
      this.position = frame.cursor;
      this.anchored = true;
    }
    this.joined = true;
    return ["ready", frame];
  }
}

/** A WebSocket as a session uses it: `opened()`, `frame(object)`, `ended(code, reason, retryMs)` are called on `to`. */
class SocketTransport {
  name = "websocket";

  constructor(base, hello, to, times) {
    const url = new URL("v1/ws", base);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    this.socket = new WebSocket(url, PROTOCOL);
    this.timer = setTimeout(() => this.close(1006, "the handshake took too long"), times.connect);
    this.socket.onopen = () => {
      clearTimeout(this.timer);
      to.opened();
      this.say(hello);
    };
    this.socket.onmessage = ({ data }) => to.text(data);
    this.socket.onclose = ({ code, reason }) => this.end(code, reason);
    this.end = (code, reason) => {
      clearTimeout(this.timer);
      this.end = () => {};
      to.ended(code, reason);
    };
  }

  say(frame) {
    if (this.socket.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(frame));
    return true;
  }

  close(code, reason) {
    this.socket.close(code >= 3000 ? code : 1000, "");
    this.end(code, reason); // at once: a dead way would keep `onclose` waiting for a minute
  }
}

/** The same over server-sent events, read with fetch because EventSource cannot send an Authorization header. */
class StreamTransport {
  name = "sse";

  constructor(base, hello, to, times) {
    this.base = base;
    this.hello = hello;
    this.unsaid = to.unsaid;
    this.abort = new AbortController();
    this.timer = setTimeout(() => this.close(1006, "the stream took too long to open"), times.connect);
    this.end = (code, reason, retryMs) => {
      clearTimeout(this.timer);
      this.end = () => {};
      this.abort.abort();
      to.ended(code, reason, retryMs);
    };
    this.#run(to, times).catch((error) => this.end(1006, String(error)));
  }

  async #run(to, times) {
    const { token, device, cursor } = this.hello;
    const url = new URL("v1/stream", this.base);
    url.searchParams.set("device", device);
    const headers = { Authorization: `Bearer ${token}`, Accept: "text/event-stream" };
    if (cursor) headers["Last-Event-ID"] = cursor;
    const response = await fetch(url, { headers, cache: "no-store", signal: this.abort.signal });
    if (!response.ok) {
      const codes = { 400: 4400, 401: 4401, 403: 4403, 404: 4400, 413: 4413, 426: 4400, 429: 4429 };
      const retry = Number(response.headers.get("Retry-After")) * 1000 || undefined;
      return this.end(codes[response.status] ?? 1006, `answered with ${response.status}`, retry);
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.close(1000, "back to WebSocket"), times.stream * (0.8 + 0.4 * Math.random()));
    to.opened();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ; ) {
      const { done, value } = await reader.read();
      if (done) return this.end(1006, "the stream ended");
      to.alive();
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) this.#event(block, to);
    }
  }

  #event(block, to) {
    let name = "", data = "";
    for (const line of block.split(/\r?\n/)) {
      const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line);
      if (field === "event") name = value;
      else if (field === "data") data += (data && "\n") + value;
    }
    if (!data) return;
    if (name !== "close") return to.text(data);
    const { code, name: reason } = JSON.parse(data);
    this.end(code, reason);
  }

  /** There is no way up in a stream: reads are requests, acks and pings are left out, the cursor says it all. */
  say(frame) {
    if (frame.op === "read") this.#post(frame).catch(() => this.unsaid(frame, "the gateway was not reached"));
    return true;
  }

  async #post({ op, ...body }) {
    const headers = { Authorization: `Bearer ${this.hello.token}`, "Content-Type": "application/json" };
    const text = JSON.stringify({ ...body, device: this.hello.device });
    const response = await fetch(new URL("v1/inbox/read", this.base), { method: "POST", headers, body: text });
    if (!response.ok) this.unsaid({ op, ...body }, `answered with ${response.status}`);
  }

  close(code, reason) {
    this.end(code, reason);
  }
}

export class Seamark extends EventTarget {
  /**
   * @param {object} options
   * @param {string | (() => string | Promise<string>)} options.token the user's JWT, or a function that gives a fresh
   *   one; with a function the session is kept beyond the token's expiry.
   * @param {string} [options.url] the gateway's address; the page's own origin if absent.
   * @param {string} [options.device] this browser's name; made once and kept in localStorage if absent.
   * @param {string} [options.cursor] where to begin; "start" for the oldest kept record. If absent: what localStorage
   *   holds for this user, then what the gateway knows of the device, else it answers with a reset.
   * @param {boolean} [options.storage=true] keep a copy of the cursor in localStorage.
   * @param {object} [options.times] other deadlines, in milliseconds (see TIMES).
   * @param {() => number} [options.random] uniform numbers in [0, 1), for the jitter.
   */
  constructor({ token, url = location.origin, device, cursor = null, storage = true, times = {}, random = Math.random }) {
    super();
    this.state = "closed";
    this.unread = null;
    this.device = device ?? this.#storedDevice();
    this.base = url.endsWith("/") ? url : `${url}/`;
    this.times = { ...TIMES, ...times };
    this.random = random;
    this.storage = storage;
    this.source = token;
    this.receiver = new Receiver(cursor);
    this.failures = this.unopened = this.refusals = this.notBefore = 0;
    this.waitingIds = new Set();
    this.waitingUpTo = this.pendingAck = this.transport = this.refused = null;
    this.running = false;
    this.timers = {};
    this.#watchPage();
  }

  /** Where the next session resumes; null before the first one has answered. */
  get cursor() {
    return this.receiver.position === "start" ? null : this.receiver.position;
  }

  /** Connect, and stay connected until `close()`. Continues where this object was. */
  connect() {
    if (this.running) return;
    this.running = true;
    this.failures = this.unopened = this.refusals = 0;
    this.#attempt();
  }

  /** End the connection; the position is kept for a later `connect()`. */
  close() {
    this.running = false;
    this.#sendAck();
    this.#store();
    this.#drop(1000, "closed by the page");
    this.#setState("closed", "closed by the page");
  }

  /**
   * Mark as read: `{ids: […]}`, `{upTo: cursor}` or `{all: true}` (everything received so far). The mark comes back as
   * a record, to this page too; without a session it waits for the next one.
   */
  read({ ids, upTo, all = false }) {
    if ((ids !== undefined) + (upTo !== undefined) + all !== 1) throw new TypeError("give one of ids, upTo, all");
    if (ids) {
      if (this.waitingIds.size + ids.length > READ_IDS_WAITING) throw new RangeError("too many ids: use upTo or all");
      for (const id of ids) this.waitingIds.add(id);
    } else {
      // "All" is fixed here: sent after a reconnect it would cover records that nobody has seen.
      this.waitingUpTo = upTo ?? this.cursor;
    }
    this.#sendReads();
  }

  // --- sessions -----------------------------------------------------------------------------------------------------

  async #attempt() {
    this.#setState("connecting");
    const session = { ready: false };
    this.session = session; // whatever an older session still says is not listened to
    // A request for a token may hang for as long as a dead network lets it.
    this.timers.token = setTimeout(() => this.#ended(1006, "no token came"), this.times.connect);
    try {
      this.token = typeof this.source === "function" ? await this.source() : this.source;
    } catch (error) {
      if (this.session === session) this.#ended(1006, `no token: ${error}`);
      return;
    }
    if (this.session !== session || !this.running) return;
    clearTimeout(this.timers.token);
    if (this.token === this.refused) return this.#stop(4401, "the only token to be had was refused");
    this.receiver.position ??= this.#storedCursor();
    this.receiver.connected();
    const mine = (act) => (...args) => { if (this.session === session) act(...args); };
    const to = {
      opened: mine(() => this.#opened()),
      alive: mine(() => this.#alive()),
      unsaid: (frame, reason) => this.#unsaid(frame, reason),
      text: mine((text) => { this.#alive(); this.#frame(text); }),
      ended: mine((code, reason, retryMs) => {
        // What swallows WebSockets ends them without a word, or lets them open and then lets nothing through.
        this.unopened = session.ready || code >= 4000 ? 0 : this.unopened + 1;
        this.#ended(code, reason, retryMs ?? session.retryMs);
      }),
    };
    const hello = { op: "hello", token: this.token, device: this.device };
    if (this.receiver.position) hello.cursor = this.receiver.position;
    // Two handshakes that never opened, then one try of the other way, then again from the front.
    const Transport = this.unopened % 3 === 2 ? StreamTransport : SocketTransport;
    try {
      this.transport = new Transport(this.base, hello, to, this.times);
    } catch (error) {
      to.ended(1006, String(error)); // the page's own policy forbids it
    }
  }

  #opened() {
    this.#alive();
    this.timers.ready = setTimeout(() => this.transport.end(1006, "no `ready` came"), this.times.connect);
    this.#watchSilence();
  }

  #drop(code, reason) {
    for (const timer of Object.values(this.timers)) clearTimeout(timer);
    this.timers = {};
    this.session = null;
    const transport = this.transport;
    this.transport = null;
    transport?.close(code, reason);
  }

  #ended(code, reason, retryMs) {
    this.#drop(code, reason);
    if (!this.running) return;
    if (STOP[code]) return this.#stop(code, STOP[code]);
    if (code === 4401) {
      this.refused = this.token;
      if (typeof this.source !== "function" || ++this.refusals >= 3) return this.#stop(code, "not authenticated");
    }
    const ceiling = Math.min(this.times.backoffMax, this.times.backoffFirst * 2 ** Math.min(this.failures++, 20));
    const jitter = this.random() * ceiling;
    const asked = retryMs ?? (code === 4429 ? this.times.tooMany : null);
    // What the gateway asks for is spread already: a little of ours on top, never less.
    const wait = asked === null ? jitter : asked + Math.min(jitter, 1000);
    this.notBefore = Date.now() + (asked ?? 0);
    this.timers.retry = setTimeout(() => this.#attempt(), wait);
    this.#setState("waiting", reason || `connection lost (${code})`, Math.round(wait));
  }

  #stop(code, message) {
    this.running = false;
    this.#drop(1000, message);
    this.#setState("closed", message);
    this.#emit("error", { code, message, fatal: true });
  }

  #alive() {
    this.lastHeard = Date.now();
  }

  /** Pings, and ends a way that has gone silent. Clock times, not counts: timers of a hidden tab run late. */
  #watchSilence() {
    this.timers.silence = setTimeout(() => {
      if (Date.now() - this.lastHeard > this.times.silence && this.pinged > this.lastHeard) {
        return this.#ended(1006, "nothing was heard from the gateway");
      }
      this.pinged = Date.now();
      this.transport.say({ op: "ping" });
      this.#watchSilence();
    }, this.times.ping);
  }

  // --- what the gateway says ----------------------------------------------------------------------------------------

  #frame(text) {
    let frame;
    try {
      frame = JSON.parse(text);
    } catch {
      return this.#ended(CHAIN_BROKEN, "not a frame of the protocol");
    }
    const [what, value] = this.receiver.on(frame);
    if (what === "restart") return this.#ended(CHAIN_BROKEN, value);
    if (what === "ready") return this.#ready(value);
    if (what === "bye") return void (this.session.retryMs = value.retry_after_ms);
    if (what === "error") return this.#emit("error", { code: value.code, message: value.detail, fatal: false });
    if (what === "unread") return this.#setUnread(value);
    if (what === "now") return this.#emit("now", value);
    if (what === "reset") this.#reset(value);
    if (what === "record") this.#emit("record", value);
    if (what === "live") this.#live(value);
    if (what === "record" || what === "reset") this.#ackLater(value.cursor);
    if (what !== "drop") this.#storeLater();
  }

  #ready(frame) {
    clearTimeout(this.timers.ready);
    this.session.ready = true;
    this.refused = null;
    this.refusals = 0;
    this.#setState("catching-up");
    this.#planRefresh();
    if (frame.unread) this.#setUnread(frame.unread);
    if (frame.resumed) this.#stands();
  }

  #reset(frame) {
    // Cursors from before mean nothing to the gateway any more.
    this.pendingAck = this.waitingUpTo = null;
    this.#stands();
    this.unread = frame.unread ?? null;
    this.#emit("reset", frame);
  }

  #live(frame) {
    this.failures = 0;
    this.#setState("live");
    this.#emit("live", frame);
  }

  #stands() {
    this.#sendReads();
    if (this.pendingAck) this.#ackLater(this.pendingAck);
  }

  #setUnread(value) {
    this.unread = value;
    this.#emit("unread", value);
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #setState(state, reason = "", retryMs = null) {
    this.state = state;
    this.#emit("state", { state, reason, retryMs, transport: this.transport?.name ?? null });
  }

  // --- what this page says ------------------------------------------------------------------------------------------

  #ackLater(cursor) {
    this.pendingAck = cursor;
    this.timers.ack ??= setTimeout(() => this.#sendAck(), this.times.ack);
  }

  #sendAck() {
    delete this.timers.ack;
    if (!this.pendingAck || !this.receiver.anchored) return;
    if (this.transport?.say({ op: "ack", cursor: this.pendingAck })) this.pendingAck = null;
  }

  #sendReads() {
    if (!this.receiver.anchored || !this.transport) return;
    if (this.waitingUpTo && this.transport.say({ op: "read", up_to: this.waitingUpTo })) this.waitingUpTo = null;
    const ids = [...this.waitingIds];
    for (let from = 0; from < ids.length; from += READ_IDS) {
      const chunk = ids.slice(from, from + READ_IDS);
      if (!this.transport.say({ op: "read", ids: chunk })) return;
      for (const id of chunk) this.waitingIds.delete(id);
    }
  }

  /** A mark did not arrive: it waits for the next session, or the next mark. */
  #unsaid({ ids = [], up_to: upTo }, reason) {
    for (const id of ids) if (this.waitingIds.size < READ_IDS_WAITING) this.waitingIds.add(id);
    this.waitingUpTo ??= upTo ?? null;
    this.#emit("error", { code: "read", message: reason, fatal: false });
  }

  #planRefresh() {
    const { exp } = claimsOf(this.token);
    if (typeof this.source !== "function" || !exp) return;
    const left = exp * 1000 - Date.now();
    const wait = Math.max(1_000, left - Math.min(60_000, left / 5));
    this.timers.refresh = setTimeout(() => this.#refresh(this.session), Math.min(wait, 2 ** 31 - 1));
  }

  async #refresh(session) {
    try {
      const token = await this.source();
      if (this.session !== session || !session) return;
      this.token = token;
      if (this.transport.name === "sse") return this.#ended(1000, "a new token"); // a stream cannot be told
      this.transport.say({ op: "refresh", token });
      this.#planRefresh();
    } catch (error) {
      if (this.session !== session) return;
      this.#emit("error", { code: "refresh", message: String(error), fatal: false });
      this.timers.refresh = setTimeout(() => this.#refresh(session), 5_000);
    }
  }

  // --- the page -----------------------------------------------------------------------------------------------------

  #watchPage() {
    const hurry = () => {
      if (this.session?.ready) return this.#probe();
      if (this.state !== "waiting" || !this.timers.retry) return;
      clearTimeout(this.timers.retry);
      const asked = Math.max(0, this.notBefore - Date.now()); // a page in front is no reason to come before
      this.timers.retry = setTimeout(() => this.#attempt(), asked + this.random() * this.times.backoffFirst);
    };
    globalThis.addEventListener?.("online", hurry);
    globalThis.addEventListener?.("pagehide", () => this.#store());
    globalThis.document?.addEventListener("visibilitychange", () => document.hidden || hurry());
  }

  /** After sleep a socket may look open for minutes while nobody is at its other end. */
  #probe() {
    if (this.timers.probe || this.transport?.name !== "websocket") return;
    const asked = Date.now();
    this.transport.say({ op: "ping" });
    this.timers.probe = setTimeout(() => {
      delete this.timers.probe;
      if (this.lastHeard < asked) this.#ended(1006, "nobody answered after the page came back");
    }, this.times.probe);
  }

  #key() {
    const { tenant = "", sub } = claimsOf(this.token ?? "");
    return sub ? `seamark:cursor:${this.base}:${tenant}:${sub}` : null;
  }

  #storedCursor() {
    const key = this.storage && this.#key();
    const held = key ? tryStorage((storage) => storage.getItem(key)) : null;
    return parseCursor(held) ? held : null;
  }

  #storeLater() {
    this.timers.store ??= setTimeout(() => this.#store(), this.times.store);
  }

  #store() {
    delete this.timers.store;
    const key = this.storage && this.#key();
    if (key && this.cursor) tryStorage((storage) => storage.setItem(key, this.cursor));
  }

  #storedDevice() {
    const held = tryStorage((storage) => storage.getItem("seamark:device"));
    if (held) return held;
    const bytes = crypto.getRandomValues(new Uint8Array(6));
    const made = `web-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
    tryStorage((storage) => storage.setItem("seamark:device", made));
    return made;
  }
}

/** localStorage may be blocked or full; then the page begins anew each time, which is all that is lost. */
function tryStorage(act) {
  try {
    return act(localStorage) ?? null;
  } catch {
    return null;
  }
}
