// The line of attention on the image along the answer, with the looks marked.

import { EYE, percent, svg } from "./dom.js";

const HEIGHT = 120;
const LEFT = 34;
const TOP = 18;
const BOTTOM = 104;

// `points`: for each token that writes another { original, inserted, even }; `looks`: token indices.
// Returns the element, `width` pixels wide, and a function that marks the tokens [first, last], or none.
export function chart(points, looks, width) {
  const most = niceTop(Math.max(0.05, ...points.map((p) => Math.max(p.original + p.inserted, p.even))));
  const x = (token) => LEFT + ((width - LEFT - 6) * token) / Math.max(points.length - 1, 1);
  const y = (share) => BOTTOM - ((BOTTOM - TOP) * share) / most;
  const line = (value) => points.map((p, token) => `${token ? "L" : "M"}${x(token).toFixed(1)} ${y(value(p)).toFixed(1)}`).join("");
  const back = (value) => points.map((p, token) => `L${x(token).toFixed(1)} ${y(value(p)).toFixed(1)}`).reverse().join("");
  const original = (p) => p.original;
  const total = (p) => p.original + p.inserted;
  const floor = `L${x(points.length - 1).toFixed(1)} ${BOTTOM}L${x(0)} ${BOTTOM}Z`;
  const cursor = svg("rect", { class: "cursor", y: TOP, height: BOTTOM - TOP, width: 0, visibility: "hidden" });
  const label = (at, text) => svg("text", { x: LEFT - 5, y: at + 4, "text-anchor": "end" }, text);
  const element = svg(
    "svg",
    { class: "chart", viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": spoken(points, looks) },
    svg("path", { class: "grid", d: `M${LEFT} ${y(most)}H${width - 6}M${LEFT} ${y(most / 2)}H${width - 6}M${LEFT} ${BOTTOM}H${width - 6}` }),
    label(y(most), percent(most)),
    label(y(most / 2), percent(most / 2)),
    label(BOTTOM, "0"),
    svg("path", { class: "original", d: line(original) + floor }),
    svg("path", { class: "inserted", d: line(total) + back(original) + "Z" }),
    svg("path", { class: "total", d: line(total) }),
    svg("path", { class: "even", d: line((p) => p.even) }),
    cursor,
    ...looks.map((token) =>
      svg(
        "g",
        { class: "look-mark", transform: `translate(${x(Math.max(token - 0.5, 0)).toFixed(1)} 0)` },
        svg("path", { class: "stem", d: `M0 ${TOP}V${BOTTOM}` }),
        svg("path", { class: "mark", d: EYE, "fill-rule": "evenodd", transform: "translate(-8 0)" }),
      ),
    ),
    svg("text", { x: LEFT, y: HEIGHT - 3 }, "first word"),
    svg("text", { x: width - 6, y: HEIGHT - 3, "text-anchor": "end" }, "last word"),
  );
  const mark = (first, last) => {
    cursor.setAttribute("visibility", first === undefined ? "hidden" : "visible");
    if (first === undefined) return;
    const [from, to] = [x(Math.max(first - 0.5, 0)), x(Math.min(last + 0.5, points.length - 1))];
    cursor.setAttribute("x", from.toFixed(1));
    cursor.setAttribute("width", Math.max(to - from, 2).toFixed(1));
  };
  return { element, mark };
}

function niceTop(value) {
  return [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8].find((top) => value <= top) ?? 1;
}

function spoken(points, looks) {
  const mean = (from, to) => {
    const part = points.slice(from, to);
    return part.reduce((sum, p) => sum + p.original + p.inserted, 0) / Math.max(part.length, 1);
  };
  const whole = `Attention on the image along the answer: ${percent(mean(0, points.length))} on average`;
  if (!looks.length) return `${whole}.`;
  return `${whole}, ${percent(mean(0, looks[0]))} before the first look and ${percent(mean(looks[0]))} from it on.`;
}
