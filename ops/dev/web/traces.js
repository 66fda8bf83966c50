/** The page of `seamark dev --traces`: which traces there are, and one of them as a waterfall. */

const $ = (id) => document.getElementById(id);
const LOOKS = 6; // roles send spans every half second (ops/dev/stack.py), each at its own time
const LOOK_MS = 700;
const SVG = "http://www.w3.org/2000/svg";

const traceId = location.pathname.match(/^\/traces\/([0-9a-f]{32})$/)?.[1];

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

async function ask(path) {
  const response = await fetch(path, { cache: "no-store" });
  if (!response.ok) throw new Error(await response.text());
  // Nanoseconds since 1970 are more than a number of JavaScript holds; a microsecond more or less does not show.
  return response.json();
}

function overview(one) {
  const began = new Date(one.start / 1e6).toLocaleTimeString([], { hour12: false });
  return element("tr", {},
    element("td", {}, began),
    element("td", { class: one.failed ? "failed" : "" }, element("a", { href: `/traces/${one.trace_id}` }, one.name)),
    element("td", {}, one.services.join(", ")),
    element("td", { class: "number" }, String(one.spans)),
    element("td", { class: "number" }, one.milliseconds.toFixed(1)));
}

/** Each span below its parent, those without one by time: pairs of a span and its depth. */
function nested(spans) {
  const known = new Set(spans.map((span) => span.span_id));
  const below = new Map();
  for (const span of spans) {
    const parent = known.has(span.parent_id) ? span.parent_id : "";
    below.set(parent, [...(below.get(parent) ?? []), span]);
  }
  const found = [];
  const walk = (parent, depth) => {
    for (const span of below.get(parent) ?? []) {
      found.push([span, depth]);
      walk(span.span_id, depth + 1);
    }
  };
  walk("", 0);
  return found;
}

function bar(span, first, last) {
  const whole = Math.max(last - first, 1);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 1000 10");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const rect = document.createElementNS(SVG, "rect");
  const at = { x: ((span.start - first) / whole) * 1000, y: 0, width: Math.max(((span.end - span.start) / whole) * 1000, 3), height: 10 };
  for (const [name, value] of Object.entries(at)) rect.setAttribute(name, String(value));
  svg.append(rect);
  return svg;
}

function line(span, depth, first, last) {
  const facts = Object.entries({ ...span.attributes, kind: span.kind, instance: span.instance, trace: span.trace_id, span: span.span_id });
  const links = span.links.filter((link) => link.trace_id !== traceId)
    .map((link) => element("dd", {}, element("a", { href: `/traces/${link.trace_id}` }, "a linked trace")));
  const details = element("details", {},
    element("summary", {}, span.name, " ", element("small", {}, span.service)),
    element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]),
      ...links.flatMap((link) => [element("dt", {}, "links to"), link])));
  details.style.setProperty("--depth", depth);
  const kinds = [span.trace_id === traceId ? "" : "elsewhere", span.failed ? "failed" : ""].join(" ").trim();
  return element("li", { class: kinds, "data-name": span.name, "data-service": span.service, "data-depth": String(depth) },
    details, bar(span, first, last), element("span", { class: "number" }, `${((span.end - span.start) / 1e6).toFixed(2)} ms`));
}

async function show() {
  if (!traceId) {
    const found = await ask("/api/traces");
    $("traces").tBodies[0].replaceChildren(...found.map(overview));
    $("traces").hidden = !found.length;
    $("notice").textContent = found.length ? "" : "Nothing has come yet: publish something.";
    return found.length;
  }
  const spans = await ask(`/api/traces/${traceId}`);
  $("about").textContent = `${traceId}, with what links to it`;
  // Of batches and of later deliveries, which link to this trace, the time outside it is not drawn.
  const own = spans.filter((span) => span.trace_id === traceId);
  const [first, last] = [Math.min(...own.map((span) => span.start)), Math.max(...own.map((span) => span.end))];
  const open = new Set([...$("waterfall").children].filter((item) => item.querySelector("details").open).map((item) => item.dataset.span));
  $("waterfall").replaceChildren(...nested(spans).map(([span, depth]) => {
    const made = line(span, depth, first, last);
    made.dataset.span = span.span_id;
    made.querySelector("details").open = open.has(span.span_id);
    return made;
  }));
  $("waterfall").hidden = !spans.length;
  $("notice").textContent = spans.length ? "" : "No span of it has come, or it is older than 15 minutes.";
  return spans.length;
}

async function look(times) {
  for (let number = 0; number < times; number += 1) {
    try {
      await show();
    } catch (error) {
      $("notice").textContent = `Cannot be read: ${error.message}`;
    }
    if (number + 1 < times) await new Promise((resolve) => { setTimeout(resolve, LOOK_MS); });
  }
}

$("again").addEventListener("click", () => look(1));
look(LOOKS);
