// Elements without markup: text only ever becomes text nodes, so that nothing a model writes is parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

// Attributes that are null, undefined or false are left out; `on...` are listeners.
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

export const byId = (id) => document.getElementById(id);

export const EYE = "M1 8C3 4 5.5 2.5 8 2.5S13 4 15 8c-2 4-4.5 5.5-7 5.5S3 12 1 8zm7-3.2a3.2 3.2 0 1 0 0 6.4 3.2 3.2 0 0 0 0-6.4z";

export function eye() {
  return svg(
    "svg",
    { class: "eye", viewBox: "0 0 16 16", "aria-hidden": "true" },
    svg("path", { d: EYE, "fill-rule": "evenodd" }),
    svg("circle", { cx: 8, cy: 8, r: 1.6 }),
  );
}

// What a screen reader is to say; the same text twice is said twice.
export function say(element, text) {
  element.textContent = "";
  requestAnimationFrame(() => (element.textContent = text));
}

export const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;
