// The result as one HTML file without scripts. It is built of elements and text nodes, and the browser escapes them.

import { both } from "./attention.js";
import { h, percent } from "./dom.js";
import { partsOf, wordsOf } from "./sections.js";
import { drawHeat, drawPlain, drawSelected, largest } from "./overlay.js";

const POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'";

const CHART_WIDTH = 400; // pixels, on which the size of its text depends

// `css` is the page's own style sheet.
export function toHtml(panels, css) {
  const [{ question, seed, temperature }] = panels;
  const body = h(
    "body",
    { class: "exported" },
    h("header", null, h("div", null, h("h1", null, question), h("p", null, `Qwen Look Again, temperature ${temperature}, seed ${seed}`))),
    h("main", null, h("div", { id: "panels", class: panels.length > 1 ? "several" : "" }, panels.map(panelOf))),
  );
  const head = h(
    "head",
    null,
    h("meta", { charset: "utf-8" }),
    h("meta", { name: "viewport", content: "width=device-width, initial-scale=1" }),
    h("meta", { "http-equiv": "Content-Security-Policy", content: POLICY }),
    h("title", null, `Qwen Look Again: ${question}`),
  );
  const style = `<style>\n${css.replace(/<\/style/gi, "")}</style>`;
  return `<!doctype html>\n<html lang="en">\n${head.outerHTML.replace("</head>", () => `${style}</head>`)}\n${body.outerHTML}\n</html>\n`;
}

function panelOf(panel) {
  const { text, looks, attention } = panel;
  const parts = partsOf(text).map((part) => {
    const look = looks.findIndex((at) => part.name === "REFLECTION" && at + "<REFLECTION>".length === part.start);
    return [look >= 0 ? lookOf(panel, look) : null, cardOf(panel, part)];
  });
  return h(
    "article",
    { class: "panel" },
    h("h3", null, panel.title),
    h("div", { class: "see" }, h("div", { class: "stage" }, figure(panel, "The image", drawPlain))),
    h(
      "div",
      { class: "said" },
      h("div", { class: `cards ${attention ? "ready" : ""}` }, parts),
      h("div", { class: "notes" }, h("p", { class: "footer" }, panel.footer.textContent)),
      attention ? h("div", { class: "line" }, panel.chart(CHART_WIDTH).parts) : null,
    ),
  );
}

function lookOf(panel, number) {
  const { selected_tokens: selected, visual_tokens: all, images } = panel.answer.insertions[number];
  const figures = [figure(panel, `${selected} of ${all} visual tokens inserted again`, (...to) => drawSelected(...to, images[0]))];
  if (panel.attention) {
    const means = panel.attention.ofLook(number, panel.text);
    const most = largest(...Object.values(means).filter(Boolean).map(({ maps }) => both(maps)));
    for (const [name, title] of [["before", "before the look"], ["after", "in the reflection"]]) {
      const mean = means[name];
      if (!mean) continue;
      const label = `attention ${title}: ${percent(mean.original + mean.inserted)}`;
      figures.push(figure(panel, label, (...to) => drawHeat(...to, panel.attention, both(mean.maps), most)));
    }
  }
  return h("div", { class: "exported-look" }, h("p", { class: "look" }, `Look ${number + 1}`), figures);
}

function figure(panel, label, draw) {
  const canvas = document.createElement("canvas");
  draw(canvas, panel.image);
  return h("figure", null, h("img", { src: canvas.toDataURL("image/jpeg", 0.9), alt: label }), h("figcaption", null, label));
}

function cardOf(panel, part) {
  const body = h("p", { class: "text" });
  let at = part.start;
  for (const word of wordsOf(part)) {
    const known = panel.cards.words.find((one) => one.start === word.start);
    const heat = known?.element.style.getPropertyValue("--heat");
    const element = h("span", { class: "word" }, word.text);
    if (heat) element.style.setProperty("--heat", heat);
    body.append(panel.text.slice(at, word.start), element);
    at = word.end;
  }
  const name = part.name ?? "TEXT";
  return h("section", { class: `card ${name.toLowerCase()}` }, h("h4", null, name), body);
}
