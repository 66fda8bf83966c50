/**
 * Seamark for browsers: follow a user's log. One ES module, no dependencies, no build step.
 *
 *   const inbox = new Seamark({ token: () => fetch("/my/token").then((r) => r.text()) });
 *   inbox.addEventListener("reset", ({ detail }) => replaceAll(detail.inbox));
 *   inbox.addEventListener("record", ({ detail }) => apply(detail.record));
 *   inbox.connect();
 *
 * Events (all `CustomEvent`): `reset` {reason, cursor, seq, unread, inbox} · `record` {seq, prev, cursor, record} ·
 * `live` {cursor, seq} · `unread` {count, as_of, stale} · `state` {state, transport, reason, retryMs} ·
 * `error` {code, message, fatal}.
 *
 * A page begins with a snapshot (`reset`) and goes on with records in log order, each once. State and position belong
 * together, so the client keeps neither over a reload. An app that stores its state stores `bookmark` with it, in one
 * write, and passes both back. WebSocket first; where that fails twice, server-sent events read with `fetch`.
 */

const PROTOCOL = "seamark.v1";
const TIMES = {
  backoffFirst: 500, // upper bound of the first wait; doubles, with full jitter
  backoffMax: 30_000,
  connect: 10_000, // for a handshake, and for `ready`
  ping: 20_000, // a `ping` is sent this often; a proxy that drops idle connections sees traffic
  silence: 50_000, // nothing at all received for so long: the way is dead
  ack: 250, // at most one ack, and one turn of new marks, in this time, as the protocol asks
  ackRequest: 5_000, // the same for an ack that is a request of its own
  probe: 5_000, // for an answer when the page comes back to the front or the network returns
  mark: 15_000, // a mark that the log has not shown after this time, or at most twice this time, is said again
  upgrade: 300_000, // over server-sent events: how often a WebSocket is tried beside the stream
  upgradeFirst: 10_000, // the first such try: the network may have been down for everything, not for WebSockets
  expiry: 10_000, // a token with less time left is not presented to a new session
  tooMany: 60_000, // after 4429
};
const READ_IDS = 200; // ids in one frame: well below the 64 KiB a gateway accepts
const READ_IDS_WAITING = 1_000; // marked ids that the log has not shown yet; `read` refuses more
const RECORD_ID = /^[!-~]{1,128}$/; // anything else would make the gateway close
const FOLLOWED = /^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f][13579bdf]$/; // a W3C trace context that is sampled
const MARK_MISSES = 5; // how often a mark is said; one that the log never shows is then given up, with an error event
const RECORDS_OPEN = 10_000; // records whose listeners have not finished; with more of them, nothing further is acknowledged
const STOP = {
  1009: "a frame was too large", 4400: "the gateway did not understand this client", 4403: "not allowed",
  4409: "another session of this user took the place of this one", 4413: "a frame was too large",
};
const CODE_OF_STATUS = { 400: 4400, 401: 4401, 403: 4403, 404: 4400, 409: 4409, 413: 4413, 426: 4400, 429: 4429 };
const ANOTHER_LOG = ["epoch", "future"]; // reasons of a `reset` after which records have other positions than before
const SAID_BY_GATEWAY = [1011, 1012, 1013]; // codes below 4000 that only a gateway sends: the carrier works
const REFUSALS = 3; // refusals of tokens in a row that are final
const CHAIN_BROKEN = 4000; // what this client closes with when it resumes because of what it received

function claimsOf(token) {
  try {
    const payload = token.split(".")[1].replace(/-/g, "+").replace(/_/g, "/");
    return JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(payload), (c) => c.charCodeAt(0)))) ?? {};
  } catch {
    return {}; // an opaque token says neither when it expires nor whose it is
  }
}

/** Whose log a token opens. Positions and marks of one owner mean nothing in the log of another. */
function ownerOf(token) {
  const { tenant = null, sub = null } = claimsOf(token);
  return { tenant, user: sub, is: (other) => other.tenant === tenant && other.user === sub };
}

/**
 * The receive rules, without I/O: `on(frame)` gives [what, value]. One position is held: that of the last frame accepted. No
 * record is between the `prev` of a record and its `seq`: with `prev` at or below the position nothing was lost, and a record
 * at or below it is a duplicate. Cursors are never looked into.
 */
export class Receiver {
  seq = null; // of the position; null until a session has answered

  constructor(cursor = null) {
    this.position = cursor; // "start" until a session has answered
    this.connected();
  }

  connected() {
    this.joined = this.anchored = false;
  }

  on(frame) {
    const op = frame?.op;
    if (op === "ready") return this.#ready(frame);
    if (!["record", "skip", "live", "pong", "reset"].includes(op)) return [op, frame];
    if ((frame.feed ?? null) !== null) return ["drop", "of another log than the user's"];
    if (!this.joined) return ["restart", "a frame of the log came before `ready`"];
    if (!this.anchored && op !== "reset") return op === "pong" ? ["drop", op] : ["restart", "the log went on before its reset"];
    const { seq, prev, cursor } = frame;
    if (typeof cursor !== "string" || !Number.isInteger(seq)) return ["restart", "a frame of the log has no position"];
    if (op === "reset") this.anchored = true;
    else if (op === "live" || op === "pong") {
      if (seq < this.seq) return op === "live" ? ["restart", "`live` lies behind what was sent"] : ["drop", op];
    } else {
      if (seq <= this.seq) return ["drop", "duplicate"];
      if (!(prev <= this.seq)) return ["restart", `${seq} follows ${prev}, but ${this.seq} is held`];
    }
    [this.position, this.seq] = [cursor, seq];
    return op === "skip" || op === "pong" ? ["advance", cursor] : [op, frame];
  }

  #ready(frame) {
    if (this.joined) return ["restart", "a second `ready`"];
    if (frame.resumed) {
      const { cursor, seq } = frame;
      if (typeof cursor !== "string" || !Number.isInteger(seq)) return ["restart", "`ready` without a cursor"];
      if (this.seq !== null && this.seq !== seq) return ["restart", "resumed from another cursor"];
      [this.position, this.seq, this.anchored] = [cursor, seq, true];
    }
    this.joined = true;
    return ["ready", frame];
  }
}

/**
 * How far the app is. A record is done when all its listeners have returned and their promises are fulfilled. Only what
 * is done, with everything before it, is acknowledged. A record whose listener threw is never done.
 */
export class Progress {
  cursor = null; // everything up to it is done
  #open = []; // handed to the listeners and not done, in log order
  #ended = false;

  /** The record or snapshot at `cursor` goes to the listeners. */
  handed(cursor) {
    const entry = { cursor, done: false, over: !this.#ended && this.#open.length >= RECORDS_OPEN };
    this.#ended ||= entry.over;
    if (!this.#ended) this.#open.push(entry);
    return entry;
  }

  /** The log moved to `cursor` without anything for the listeners. */
  passed(cursor) {
    if (this.#ended) return;
    if (this.#open.length) this.#open.at(-1).cursor = cursor;
    else this.cursor = cursor;
  }

  done(entry) {
    entry.done = true;
    while (this.#open[0]?.done) this.cursor = this.#open.shift().cursor;
  }

  /** What comes after can never be done, so it is not kept. */
  failed(entry) {
    const at = this.#open.indexOf(entry);
    if (at < 0) return;
    this.#open.length = at + 1;
    this.#ended = true;
  }
}

/**
 * What the user has read and the log does not show yet. A frame written into a dying socket is not stored, so a mark
 * stays here until a record says the same, whoever wrote that record. Each mark is { due, refused, ticks, misses, request }:
 * `request` is the id of the frame that said it last.
 */
export class Marks {
  ids = new Map();
  upTo = null; // { cursor, seq, … }: only the highest one counts
  #requests = 0;

  get size() {
    return this.ids.size + (this.upTo ? 1 : 0);
  }

  #all() {
    return this.upTo ? [...this.ids.values(), this.upTo] : [...this.ids.values()];
  }

  /** Whether one waits to be said. */
  get due() {
    return this.#all().some((mark) => mark.due);
  }

  add(ids) {
    for (const id of ids) if (!this.ids.has(id)) this.ids.set(id, this.#mark());
  }

  #mark() {
    return { due: true, refused: false, ticks: 0, misses: 0, request: "" };
  }

  reach({ cursor, seq }) {
    if (this.upTo?.seq >= seq) return;
    this.upTo = { cursor, seq, ...this.#mark() };
  }

  /** The frames to send now, on a session that has received all up to `seq`; a mark beyond would be a bad frame. */
  take(seq) {
    const frames = [];
    const say = (frame, marks) => {
      const id = `read-${++this.#requests}`;
      for (const mark of marks) Object.assign(mark, { due: false, refused: false, ticks: 0, request: id });
      frames.push({ op: "read", id, ...frame });
    };
    if (this.upTo?.due && this.upTo.seq <= seq) say({ up_to: this.upTo.cursor }, [this.upTo]);
    const due = [...this.ids].filter(([, mark]) => mark.due);
    for (let from = 0; from < due.length; from += READ_IDS) {
      const part = due.slice(from, from + READ_IDS);
      say({ ids: part.map(([id]) => id) }, part.map(([, mark]) => mark));
    }
    return frames;
  }

  /** A new session has caught up. The marks it has not shown were not stored, so all are due again. */
  again() {
    for (const mark of this.#all()) mark.due = true;
  }

  /** The gateway could not store what this frame said: the next tick says it again, and that is no miss. */
  refused(request) {
    for (const mark of this.#all()) if (!mark.due && mark.request === request) Object.assign(mark, { refused: true, ticks: 1 });
  }

  /** What this frame said can never be stored: it is given up. */
  lost(request) {
    const is = (mark) => mark.request === request;
    return this.#drop([...this.ids].filter(([, mark]) => is(mark)).map(([id]) => id), this.upTo !== null && is(this.upTo));
  }

  /** Time has passed. Gives the marks that are given up, as {ids, upTo}; null if there are none. */
  tick() {
    const isLost = (mark) => {
      if (mark.due || ++mark.ticks < 2) return false;
      mark.due = true;
      return !mark.refused && ++mark.misses >= MARK_MISSES;
    };
    return this.#drop([...this.ids].filter(([, mark]) => isLost(mark)).map(([id]) => id), this.upTo !== null && isLost(this.upTo));
  }

  #drop(ids, position) {
    for (const id of ids) this.ids.delete(id);
    const upTo = position ? this.upTo.cursor : null;
    if (position) this.upTo = null;
    return ids.length || position ? { ids, upTo } : null;
  }

  /** The log shows a record: the marks that it states are done. */
  shown(record) {
    if (this.size === 0 || record?.kind !== "read") return;
    for (const id of record.ids ?? []) this.ids.delete(id);
    if (this.upTo?.seq <= record.up_to) this.upTo = null;
  }

  /** A snapshot came, which may show what was marked. Gives a position that means nothing in this log any more. */
  reset({ reason, inbox = [] }) {
    for (const row of inbox) if (row.read) this.ids.delete(row.id);
    return this.#drop([], this.upTo !== null && ANOTHER_LOG.includes(reason));
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
    this.greeted = false;
    this.socket.onopen = () => {
      clearTimeout(this.timer);
      to.opened();
      this.greeted = this.say(hello);
    };
    this.socket.onmessage = ({ data }) => to.text(data);
    this.socket.onclose = ({ code, reason }) => {
      // A tab that slept may say hello to a gateway that closed long ago: then the token never left.
      if (this.socket.bufferedAmount > 0) this.greeted = false;
      this.end(code, reason);
    };
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
    this.greeted = true; // the token is in the request
    this.to = to;
    this.abort = new AbortController();
    this.timer = setTimeout(() => this.close(1006, "the stream took too long to open"), times.connect);
    this.end = (code, reason, retryMs) => {
      clearTimeout(this.timer);
      this.end = () => {};
      this.abort.abort();
      to.ended(code, reason, retryMs);
    };
    this.#run(to).catch((error) => this.end(1006, String(error)));
  }

  async #run(to) {
    const { token, device, cursor, snapshot, capabilities } = this.hello;
    const url = new URL("v1/stream", this.base);
    url.searchParams.set("device", device);
    url.searchParams.set("capabilities", capabilities.join());
    if (snapshot) url.searchParams.set("snapshot", "true");
    const headers = { Authorization: `Bearer ${token}`, Accept: "text/event-stream" };
    if (cursor) headers["Last-Event-ID"] = cursor;
    const response = await fetch(url, { headers, cache: "no-store", signal: this.abort.signal });
    if (!response.ok) {
      const retry = Number(response.headers.get("Retry-After")) * 1000 || undefined;
      return this.end(CODE_OF_STATUS[response.status] ?? 1006, `answered with ${response.status}`, retry);
    }
    clearTimeout(this.timer);
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
      const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line); // s: a text may hold U+2028
      if (field === "event") name = value;
      else if (field === "data") data += (data && "\n") + value;
    }
    if (!data) return;
    if (name !== "close") return to.text(data);
    const { code, name: reason } = JSON.parse(data);
    this.end(code, reason);
  }

  /** There is no way up in a stream: reads and acks are requests, pings are left out. */
  say(frame, after) {
    if (frame.op === "read") this.#read(frame).catch(() => this.to.unsaid(frame.id, "the gateway was not reached", false));
    if (frame.op === "ack") this.#ack(frame.cursor, after).catch(() => {}); // the next one says it again
    return true;
  }

  async #read({ id, ids, up_to }) {
    const { ok, status } = await this.#post("v1/inbox/read", { ids, up_to });
    if (!ok) this.to.unsaid(id, `answered with ${status}`, [400, 403, 404, 409, 413].includes(status));
  }

  async #ack(cursor, after) {
    if ((await this.#post("v1/ack", { after, cursor })).ok) this.to.acknowledged(after, cursor);
  }

  #post(path, body) {
    const headers = { Authorization: `Bearer ${this.hello.token}`, "Content-Type": "application/json" };
    const text = JSON.stringify({ ...body, device: this.hello.device });
    return fetch(new URL(path, this.base), { method: "POST", headers, body: text });
  }

  close(code, reason) {
    this.end(code, reason);
  }
}

export class Seamark extends EventTarget {
  #watched = new WeakMap(); // listener → what is registered in its place
  #handling = null; // the results of the listeners of the event that is being emitted

  /**
   * @param {object} options
   * @param {string | (() => string | Promise<string>)} options.token the user's JWT, or a function that gives a fresh
   *   one. The function is asked at `connect()` and when a token expires or is refused, not at every reconnect. When it
   *   gives a token of another user, everything of the former user is forgotten and a `reset` with reason `user` says so.
   * @param {string} [options.url] the gateway's address; the page's own origin if absent.
   * @param {string} [options.device] this browser's name; made once and kept in localStorage if absent.
   * @param {string | {tenant, user, cursor}} [options.cursor] where to begin: a `bookmark` that the app kept with its
   *   state (used only if the token is of the same user), a plain cursor, or "start" for the oldest kept record.
   * @param {boolean} [options.snapshot=true] without a cursor, begin with a snapshot. False: behind what this device has
   *   acknowledged, where the gateway knows that.
   * @param {(traceparent: string, record: object) => ((failed: boolean) => void) | undefined} [options.trace] continues the
   *   trace of a record that is followed; what it gives is called when the listeners are done with the record.
   * @param {object} [options.times] other deadlines, in milliseconds (see TIMES).
   * @param {() => number} [options.random] uniform numbers in [0, 1), for the jitter.
   */
  constructor({ token, url = location.origin, device, cursor = null, snapshot = true, trace, times = {}, random = Math.random }) {
    super();
    this.state = "closed";
    this.device = device ?? storedDevice();
    this.base = url.endsWith("/") ? url : `${url}/`;
    this.times = { ...TIMES, ...times };
    this.random = random;
    this.snapshot = snapshot;
    this.source = token;
    this.trace = trace;
    this.owner = null; // nobody yet
    this.bookmarked = typeof cursor === "object" ? cursor : null;
    this.#begin(this.bookmarked ? null : cursor);
    this.failures = this.misses = this.refusals = this.notBefore = 0;
    this.carrier = SocketTransport;
    this.token = this.refused = this.session = this.transport = this.probe = this.acked = null;
    this.running = false;
    this.timers = {};
    this.capabilities = []; // what the gateway can do beyond the first version of the protocol
  }

  #begin(cursor) {
    this.receiver = new Receiver(cursor);
    this.progress = new Progress();
    this.marks = new Marks();
    this.unread = null;
    this.unacked = null; // the cursor behind which nothing is acknowledged
  }

  /** Where the next session resumes; null before the first one has answered. */
  get cursor() {
    return this.receiver.position === "start" ? null : this.receiver.position;
  }

  /** Where an app that stores its state begins next time: behind all records that are done. Null before the first. */
  get bookmark() {
    const { cursor } = this.progress;
    return cursor && this.owner ? { tenant: this.owner.tenant, user: this.owner.user, cursor } : null;
  }

  /** Connect, and stay connected until `close()`. Continues where this object was, if the token is of the same user. */
  connect() {
    if (this.running) return;
    this.running = true;
    this.failures = this.misses = this.refusals = 0;
    this.token = null; // the app may have another user by now
    this.#watchPage();
    this.#attempt();
  }

  /** End the connection; position and marks are kept for a later `connect()`. */
  close() {
    this.running = false;
    this.#sendAck();
    if (this.state === "live") this.#sayMarks();
    this.#drop(1000, "closed by the page");
    this.watching?.abort();
    this.#setState("closed", "closed by the page");
  }

  /**
   * Mark as read: `{ids: […]}`, `{upTo}` (the detail of a `record`, `reset` or `live`), or `{all: true}` (everything received
   * so far). The mark comes back as a record, to this page too. It is kept, and said again on every session, until it does.
   */
  read({ ids, upTo, all = false }) {
    if ((ids !== undefined) + (upTo !== undefined) + all !== 1) throw new TypeError("give one of ids, upTo, all");
    if (ids) {
      for (const id of ids) {
        if (typeof id !== "string" || !RECORD_ID.test(id)) throw new TypeError(`ids: ${id} is no id of a record`);
      }
      if (this.marks.ids.size + ids.length > READ_IDS_WAITING) throw new RangeError("too many ids: use upTo or all");
      this.marks.add(ids);
    } else {
      // "All" is fixed here: sent after a reconnect it would cover records that nobody has seen.
      const { position: cursor, seq } = this.receiver;
      const to = upTo ?? { cursor, seq };
      if (upTo !== undefined && !(typeof to?.cursor === "string" && Number.isInteger(to.seq))) {
        throw new TypeError("upTo takes what a `record`, `reset` or `live` event has brought");
      }
      if (to.seq !== null) this.marks.reach(to);
    }
    if (this.state === "live") this.#sayMarksSoon();
  }

  // --- events ---------------------------------------------------------------------------------------------------------

  /** As for any EventTarget, but what a listener throws or promises is noticed: see `Progress`. */
  addEventListener(type, listener, options) {
    super.addEventListener(type, this.#watch(listener), options);
  }

  removeEventListener(type, listener, options) {
    super.removeEventListener(type, this.#watch(listener), options);
  }

  #watch(listener) {
    if (!listener || this.#watched.has(listener)) return listener && this.#watched.get(listener);
    const watched = (event) => {
      const handling = this.#handling;
      try {
        const given = typeof listener === "function" ? listener.call(this, event) : listener.handleEvent(event);
        if (typeof given?.then === "function") handling?.promised.push(given);
      } catch (error) {
        if (handling) handling.threw = true;
        throw error; // to the console, as ever
      }
    };
    this.#watched.set(listener, watched);
    return watched;
  }

  #emit(type, detail) {
    const outer = this.#handling;
    const handling = (this.#handling = { threw: false, promised: [] });
    this.dispatchEvent(new CustomEvent(type, { detail }));
    this.#handling = outer;
    return handling;
  }

  /** Give a record or snapshot to the listeners; it is done when they are. */
  #hand(type, frame) {
    const progress = this.progress, entry = progress.handed(frame.cursor);
    const end = this.#follow(type, frame);
    const done = () => {
      progress.done(entry);
      end(false);
      if (progress === this.progress) this.#ackLater();
    };
    const failed = () => {
      progress.failed(entry);
      end(true);
      this.#error("listener", `a listener failed at ${frame.cursor}: nothing from there on is acknowledged`);
    };
    if (entry.over) this.#error("listener", "too many records wait for their listeners: no more is acknowledged");
    const { threw, promised } = this.#emit(type, frame);
    if (threw) return failed();
    if (promised.length === 0) return done();
    Promise.all(promised).then(done, (error) => (globalThis.reportError?.(error), failed()));
  }

  /** Have the app follow a record whose context says so; what to call when its listeners are done. A fault of it costs no record. */
  #follow(type, { record }) {
    const safely = (act) => { try { return act(); } catch (error) { globalThis.reportError?.(error); return null; } };
    if (!this.trace || type !== "record" || !FOLLOWED.test(record?.trace)) return () => {};
    const end = safely(() => this.trace(record.trace, record));
    return (failed) => safely(() => end?.(failed));
  }

  #error(code, message, more = {}) {
    this.#emit("error", { code, message, fatal: false, ...more });
  }

  #setState(state, reason = "", retryMs = null) {
    this.state = state;
    this.#emit("state", { state, reason, retryMs, transport: this.transport?.name ?? null });
  }

  // --- sessions -----------------------------------------------------------------------------------------------------

  async #attempt() {
    const session = { ready: false };
    this.session = session; // whatever an older session still says is not listened to
    this.#setState("connecting");
    if (this.session !== session) return;
    if (this.#wantsToken() && !(await this.#askForToken(session))) return;
    this.#belongTo(ownerOf(this.token));
    if (this.session !== session) return;
    this.receiver.connected();
    this.acked = null;
    const mine = (act) => (...args) => { if (this.session === session) act(...args); };
    const { marks } = this;
    const to = {
      opened: mine(() => this.#opened()),
      alive: mine(() => this.#alive()),
      unsaid: (request, reason, final) => this.#unsaid(marks, request, reason, final),
      acknowledged: (after, cursor) => this.#acknowledged(after, cursor),
      text: mine((text) => { this.#alive(); this.#frame(text); }),
      ended: mine((code, reason, retryMs) => {
        if (!session.ready && code < 4000 && !SAID_BY_GATEWAY.includes(code)) this.#missed();
        this.#ended(code, reason, retryMs ?? session.retryMs);
      }),
    };
    try {
      this.transport = new this.carrier(this.base, this.#hello(), to, this.times);
    } catch (error) {
      to.ended(1006, String(error)); // the page's own policy forbids it
    }
  }

  /** A token serves until it expires or is refused, so a network that flaps does not cost its issuer a request each time. */
  #wantsToken() {
    if (!this.token || this.token === this.refused) return true;
    const { exp } = claimsOf(this.token);
    return typeof this.source === "function" && exp * 1000 - Date.now() < this.times.expiry;
  }

  /** False: the session has ended meanwhile. */
  async #askForToken(session) {
    // A request for a token may hang for as long as a dead network lets it.
    this.timers.token = setTimeout(() => this.#ended(1006, "no token came"), this.times.connect);
    try {
      const token = typeof this.source === "function" ? await this.source() : this.source;
      if (typeof token !== "string" || !token) throw new TypeError("`token` must give the user's token as text");
      if (this.session !== session) return false;
      this.token = token;
    } catch (error) {
      if (this.session === session) this.#ended(1006, `no token: ${error}`);
      return false;
    }
    clearTimeout(this.timers.token);
    return true;
  }

  /** Position, marks and count are of one user's log. With another user's token all of it goes, before anything is said. */
  #belongTo(owner) {
    const former = this.owner;
    this.owner = owner;
    if (former === null && this.bookmarked && owner.is(this.bookmarked)) {
      this.receiver = new Receiver(this.bookmarked.cursor);
    }
    if (former === null || owner.is(former)) return;
    this.#begin(null);
    this.#emit("reset", { reason: "user", cursor: null, unread: null, inbox: [] });
  }

  #hello() {
    const hello = { op: "hello", token: this.token, device: this.device, capabilities: ["now"] };
    if (this.receiver.position) hello.cursor = this.receiver.position;
    else if (this.snapshot) hello.snapshot = true;
    return hello;
  }

  /**
   * The carrier let nothing through. Some proxies end WebSockets without a word, or let them open and then let nothing
   * pass. After two such failures a stream is tried, after one more a WebSocket again. A carrier that worked is kept.
   */
  #missed() {
    const isSocket = this.carrier === SocketTransport;
    if (++this.misses < (isSocket ? 2 : 1)) return;
    this.carrier = isSocket ? StreamTransport : SocketTransport;
    this.misses = 0;
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
    const { transport, probe } = this;
    this.transport = this.probe = null;
    probe?.close(1000, reason);
    transport?.close(code, reason);
  }

  #ended(code, reason, retryMs) {
    const greeted = this.transport?.greeted ?? false;
    if (code === 4409 && this.probe) code = 1006; // our own second session took the place of this one
    this.#drop(code, reason);
    if (!this.running) return;
    if (STOP[code]) return this.#stop(code, STOP[code]);
    if (code === 4401 && greeted) {
      // Not at the first refusal: a slow gateway may have refused a good token.
      const spent = typeof this.source !== "function" && claimsOf(this.token).exp * 1000 <= Date.now();
      if (spent || ++this.refusals >= REFUSALS) return this.#stop(code, "not authenticated");
      this.refused = this.token;
    }
    const ceiling = Math.min(this.times.backoffMax, this.times.backoffFirst * 2 ** Math.min(this.failures++, 20));
    const jitter = this.random() * ceiling;
    const asked = retryMs ?? (code === 4429 ? this.times.tooMany : null);
    // What the gateway asks for is spread already: a little of ours on top, never less.
    const wait = asked === null ? jitter : asked + Math.min(jitter, 1000);
    this.notBefore = performance.now() + (asked ?? 0);
    this.timers.retry = setTimeout(() => this.#attempt(), wait);
    this.#setState("waiting", reason || `connection lost (${code})`, Math.round(wait));
  }

  /** Replace this session by another one at once: nothing has failed. */
  #renew(reason) {
    this.#drop(1000, reason);
    this.#attempt();
  }

  #stop(code, message) {
    this.running = false;
    this.#drop(1000, message);
    this.watching?.abort();
    this.#setState("closed", message);
    this.#emit("error", { code, message, fatal: true });
  }

  #alive() {
    this.lastHeard = performance.now(); // not the wall clock, which somebody may set
  }

  /** Pings, and ends a connection that has gone silent. It compares times, as timers of a hidden tab run late. */
  #watchSilence() {
    this.timers.silence = setTimeout(() => {
      if (performance.now() - this.lastHeard > this.times.silence && this.pinged > this.lastHeard) {
        return this.#ended(1006, "nothing was heard from the gateway");
      }
      this.pinged = performance.now();
      this.transport.say({ op: "ping" });
      this.#watchSilence();
    }, this.times.ping);
  }

  /** Where a stream carries the session: try a WebSocket beside it, and change over once it has answered `ready`. */
  #planUpgrade(ms) {
    if (this.transport?.name !== "sse") return;
    const { session } = this;
    this.timers.upgrade = setTimeout(() => this.#tryWebSocket(session), ms * (0.8 + 0.4 * this.random()));
  }

  #tryWebSocket(session) {
    let over = false;
    const end = (works) => {
      if (over) return;
      over = true;
      clearTimeout(deadline);
      this.probe?.close(1000, "tried");
      this.probe = null;
      if (this.session !== session) return;
      if (!works) return this.#planUpgrade(this.times.upgrade);
      this.carrier = SocketTransport;
      this.#renew("back to WebSocket");
    };
    const deadline = setTimeout(() => end(false), this.times.connect);
    const text = (said) => end(parseFrame(said)?.op === "ready");
    try {
      this.probe = new SocketTransport(this.base, this.#hello(), { opened() {}, text, ended: () => end(false) }, this.times);
    } catch {
      end(false);
    }
  }

  // --- what the gateway says ----------------------------------------------------------------------------------------

  #frame(text) {
    const frame = parseFrame(text);
    if (!frame) return this.#ended(CHAIN_BROKEN, "not a frame of the protocol");
    const [what, value] = this.receiver.on(frame);
    switch (what) {
      case "restart": return this.#ended(CHAIN_BROKEN, value);
      case "ready": return this.#ready(value);
      case "bye": return void (this.session.retryMs = value.retry_after_ms);
      case "error": return this.#refusedByGateway(value);
      case "unread": return this.#setUnread(value);
      case "now": return void this.#emit("now", value);
      case "reset": return this.#reset(value);
      case "record":
        this.marks.shown(value.record);
        return this.#hand("record", value);
      case "live":
        this.progress.passed(value.cursor);
        return this.#live(value);
      case "advance": return this.progress.passed(value);
    }
  }

  #ready(frame) {
    const { session } = this;
    clearTimeout(this.timers.ready);
    session.ready = true;
    this.capabilities = frame.capabilities ?? [];
    if (frame.resumed) this.unacked ??= frame.cursor;
    this.refused = null;
    this.refusals = this.misses = 0;
    this.#setState("catching-up");
    if (this.session !== session) return; // a listener has closed
    this.#planRefresh();
    this.#planUpgrade(Math.min(this.times.upgradeFirst, this.times.upgrade));
    if (frame.unread) this.#setUnread(frame.unread);
    if (frame.resumed && this.progress.cursor) this.#ackLater();
  }

  #reset(frame) {
    const { session } = this;
    this.progress = new Progress(); // cursors from before mean nothing to the gateway any more
    this.acked = null;
    this.unacked = frame.cursor;
    this.unread = frame.unread ?? null;
    const lost = this.marks.reset(frame);
    this.#hand("reset", frame);
    if (lost) this.#lost(lost, "their log is no more");
    if (frame.unread && this.session === session) this.#emit("unread", frame.unread);
  }

  #live(frame) {
    const { session } = this;
    this.failures = 0;
    const first = !session.live;
    session.live = true;
    if (this.state !== "live") this.#setState("live");
    if (this.session === session) this.#emit("live", frame);
    if (this.session !== session) return;
    // Now it is known which marks the log holds: whatever it has not shown was not stored.
    if (first) this.marks.again();
    this.#sayMarks();
  }

  #setUnread(value) {
    this.unread = value;
    this.#emit("unread", value);
  }

  #refusedByGateway({ code, detail, id }) {
    if (code === "too_many_reads" || code === "unavailable") this.marks.refused(id);
    this.#error(code, detail);
    const lost = code === "stale_cursor" && this.marks.lost(id);
    if (lost) this.#lost(lost, "their log is no more");
  }

  // --- what this page says ------------------------------------------------------------------------------------------

  #ackLater() {
    const wait = this.transport?.name === "sse" ? this.times.ackRequest : this.times.ack;
    this.timers.ack ??= setTimeout(() => this.#sendAck(), wait);
  }

  #sendAck() {
    delete this.timers.ack;
    const { cursor } = this.progress;
    if (!cursor || cursor === this.acked || !this.receiver.anchored) return;
    if (!this.transport?.say({ op: "ack", cursor }, this.unacked)) return;
    this.acked = cursor;
    if (this.transport.name === "websocket") this.#acknowledged(this.unacked, cursor);
  }

  #acknowledged(after, cursor) {
    if (this.unacked === after) this.unacked = cursor; // else the log was reset meanwhile, or answers overtook each other
  }

  /** At once, but not more often than acks: a page may mark row after row, and a client may send 600 frames in a minute. */
  #sayMarksSoon() {
    if (this.timers.say) return;
    this.timers.say = setTimeout(() => {
      delete this.timers.say;
      if (this.marks.due && this.state === "live") this.#sayMarksSoon();
    }, this.times.ack);
    this.#sayMarks();
  }

  #sayMarks() {
    if (!this.transport) return;
    for (const frame of this.marks.take(this.receiver.seq)) if (!this.transport.say(frame)) return; // the next session says it
    if (this.marks.size) this.timers.marks ??= setTimeout(() => this.#tick(), this.times.mark);
  }

  #tick() {
    delete this.timers.marks;
    const lost = this.marks.tick();
    this.#sayMarks();
    if (lost) this.#lost(lost, "the log has never shown them");
  }

  #lost(lost, why) {
    this.#error("mark_lost", `read marks were given up: ${why}`, lost);
  }

  /** A request with a mark failed: the mark is said again, unless it can never be stored. */
  #unsaid(marks, request, reason, final) {
    const lost = final && marks.lost(request);
    if (lost) return this.#lost(lost, reason);
    marks.refused(request);
    this.#error("read", reason);
  }

  #planRefresh() {
    const { exp, iat } = claimsOf(this.token);
    if (typeof this.source !== "function" || !exp) return;
    // The gateway accepted it: if it has expired by our clock, the clock is ahead, so we go by the token's own life.
    const left = exp * 1000 > Date.now() ? exp * 1000 - Date.now() : (exp - iat) * 1000;
    if (!(left > 0)) return;
    const wait = Math.max(1_000, left - Math.min(60_000, left / 5));
    this.timers.refresh = setTimeout(() => this.#refresh(this.session), Math.min(wait, 2 ** 31 - 1));
  }

  async #refresh(session) {
    try {
      const token = await this.source();
      if (this.session !== session || !session) return;
      this.token = token;
      // A stream cannot be given another token, and a session belongs to one user.
      if (this.transport.name === "sse" || !ownerOf(token).is(this.owner)) return this.#renew("a new token");
      this.transport.say({ op: "refresh", token });
      this.#planRefresh();
    } catch (error) {
      if (this.session !== session) return;
      this.#error("refresh", String(error));
      this.timers.refresh = setTimeout(() => this.#refresh(session), 5_000);
    }
  }

  // --- the page -----------------------------------------------------------------------------------------------------

  #watchPage() {
    this.watching?.abort();
    this.watching = new AbortController();
    const { signal } = this.watching;
    const hurry = () => {
      if (this.session?.ready) return this.#probe();
      if (this.state !== "waiting" || !this.timers.retry) return;
      clearTimeout(this.timers.retry);
      const asked = Math.max(0, this.notBefore - performance.now()); // a page in front is no reason to come before
      this.timers.retry = setTimeout(() => this.#attempt(), asked + this.random() * this.times.backoffFirst);
    };
    globalThis.addEventListener?.("online", hurry, { signal });
    globalThis.addEventListener?.("pageshow", ({ persisted }) => persisted && hurry(), { signal });
    globalThis.document?.addEventListener("visibilitychange", () => document.hidden || hurry(), { signal });
  }

  /** After sleep a socket may look open for minutes while nobody is at its other end. */
  #probe() {
    if (this.timers.probe || this.transport?.name !== "websocket") return;
    const asked = performance.now();
    this.transport.say({ op: "ping" });
    this.timers.probe = setTimeout(() => {
      delete this.timers.probe;
      if (this.lastHeard < asked) this.#ended(1006, "nobody answered after the page came back");
    }, this.times.probe);
  }
}

function parseFrame(text) {
  try {
    const frame = JSON.parse(text);
    return typeof frame === "object" ? frame : null;
  } catch {
    return null;
  }
}

/** This browser's name, made once. It belongs to the browser, not to a user, and says nothing about one. */
function storedDevice() {
  const held = tryStorage((storage) => storage.getItem("seamark:device"));
  if (held) return held;
  const bytes = crypto.getRandomValues(new Uint8Array(6));
  const made = `web-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
  tryStorage((storage) => storage.setItem("seamark:device", made));
  return made;
}

/** localStorage may be blocked or full. Then the browser has another name after each reload; nothing else is lost. */
function tryStorage(act) {
  try {
    return act(localStorage) ?? null;
  } catch {
    return null;
  }
}
