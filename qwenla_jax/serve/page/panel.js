// One answer: its cards, and beside them the image with what was looked at.

import { both } from "./attention.js";
import { Cards } from "./cards.js";
import { chart } from "./chart.js";
import { h, percent, say } from "./dom.js";
import { reflectionsOf } from "./sections.js";
import { drawHeat, drawPlain, drawSelected, largest } from "./overlay.js";

export const TITLES = { none: "No re-attention", copy: "COPY", route: "ROUTE" };

export class Panel {
  // `asked`: { mode, keep, question, seed, temperature, most, image }, `image` a canvas that stays as it is.
  constructor(asked) {
    Object.assign(this, asked, { answer: null, text: "", attention: null, look: null });
    const inserts = this.mode !== "none";
    this.cards = new Cards({
      inserts,
      most: this.most,
      onLook: (number) => say(this.spoken, this.choose(number)),
      onWord: (word, focused) => this.showWord(word, focused),
    });
    const canvas = (label) => h("canvas", { role: "img", "aria-label": label });
    this.stage = canvas("The image");
    this.small = [canvas(""), canvas("")];
    this.smallTitles = this.small.map(() => h("figcaption"));
    this.pairTitle = h("h4");
    const scale = h("span", { class: "scale" }, "less", h("i"), "more");
    const figures = this.small.map((one, i) => h("figure", null, one, this.smallTitles[i]));
    this.pair = h("div", { class: "pair", hidden: true }, h("div", { class: "pair-head" }, this.pairTitle, scale), figures);
    this.caption = h("figcaption", { class: "caption" });
    this.spoken = h("p", { class: "unseen", role: "status" });
    this.state = h("p", { class: "state", role: "status" });
    this.line = h("div", { class: "line" });
    const note = this.mode === "route" ? `${Math.round(100 * this.keep)}% of the tokens` : inserts ? "all tokens" : "text alone";
    this.title = `${TITLES[this.mode]}: ${note}`;
    this.footer = h("p", { class: "footer" });
    this.hint = h("p", { class: "hint", hidden: true }, "Words are shaded by the attention on the image of the steps that write them. Point at one for its heat map.");
    this.element = h(
      "article",
      { class: "panel", "aria-label": this.title },
      h("h3", null, TITLES[this.mode], h("span", { class: "note" }, note)),
      h("div", { class: "see" }, h("figure", { class: "stage" }, this.stage, this.caption), this.state, this.pair, this.spoken),
      h("div", { class: "said" }, this.cards.element, h("div", { class: "notes" }, this.footer, this.hint), this.line),
    );
    drawPlain(this.stage, this.image);
  }

  stream(text) {
    this.text = text;
    this.cards.stream(text);
  }

  finish(answer) {
    this.answer = answer;
    this.text = answer.text;
    this.looks = reflectionsOf(answer.text).slice(0, answer.insertions.length);
    this.cards.finish(answer.text, answer.insertions, this.looks);
    const parts = [`${answer.ids.length} tokens`, `seed ${this.seed}`];
    if (answer.reason === "length") parts.push("cut off at the most tokens allowed");
    this.footer.textContent = parts.join(", ");
    if (this.looks.length) this.choose(0);
    else this.showImage();
  }

  reflects() {
    return reflectionsOf(this.text).length > 0;
  }

  // While the attention is computed, and where it cannot be.
  setState(state, busy = false) {
    this.state.textContent = state;
    this.state.classList.toggle("busy", busy);
  }

  measured(attention) {
    this.attention = attention;
    const { parts, mark } = this.chart(Math.max(this.line.clientWidth, 260));
    this.mark = mark;
    this.line.replaceChildren(...parts);
    this.cards.enable((word) => {
      const mean = attention.mean(attention.writersOf(word));
      return mean && mean.original + mean.inserted;
    });
    this.hint.hidden = false;
    this.choose(this.look);
  }

  // The line of attention, `width` pixels wide: elements, and what marks tokens in it.
  chart(width) {
    const points = this.attention.shares.slice(0, -1); // the last token writes none
    const looks = this.attention.insertions.map((one) => one.position);
    const { element, mark } = chart(points, looks, width);
    const key = (kind, text) => h("li", { class: kind }, text);
    const inserted = looks.length ? key("inserted", "inserted tokens") : null;
    const legend = h("ul", { class: "legend" }, key("original", "original tokens"), inserted, key("even", "evenly spread"));
    return { parts: [h("h4", null, "Attention on the image along the answer"), element, legend], mark };
  }

  // Shows a look, or with null the image alone; returns what there is to say of it.
  choose(look) {
    this.look = look;
    this.cards.pressed(look);
    this.mark?.();
    if (look === null) return this.showImage();
    const { selected_tokens: selected, visual_tokens: all, images } = this.answer.insertions[look];
    drawSelected(this.stage, this.image, images[0]);
    const what = selected === all ? `All ${all} visual tokens` : `The ${selected} most attended of ${all} visual tokens`;
    let caption = `${what} are inserted again before ${this.looks.length > 1 ? `reflection ${look + 1}` : "the reflection"}.`;
    if (this.attention) {
      const { before, after } = this.attention.ofLook(look, this.text);
      const most = largest(...[before, after].filter(Boolean).map(({ maps }) => both(maps)));
      this.showPair(
        "Attention on the image",
        [
          ["before the look", before && both(before.maps), before && before.original + before.inserted],
          ["in the reflection", both(after.maps), after.original + after.inserted],
        ],
        most,
      );
      caption += ` In the reflection ${percent(after.original)} of the attention goes to the original tokens and ${percent(after.inserted)} to the inserted ones.`;
    }
    this.setCaption(caption);
    this.stage.setAttribute("aria-label", `The image with the inserted tokens: ${selected} of ${all}`);
    return caption;
  }

  showImage() {
    drawPlain(this.stage, this.image);
    this.stage.setAttribute("aria-label", "The image");
    this.pair.hidden = true;
    const seen = this.reflects() ? "The reflection is text alone: nothing is inserted." : NO_REFLECTION;
    const caption = seen + (this.attention ? " Choose a word to see where it looks." : "");
    this.setCaption(caption);
    return caption;
  }

  showWord(word, focused) {
    if (!this.attention) return;
    if (word === null) {
      const held = this.cards.words.find(({ element }) => element === document.activeElement);
      if (!held) return this.choose(this.look);
      word = held;
    }
    const writers = this.attention.writersOf(word);
    this.mark(writers[0], writers.at(-1));
    const mean = this.attention.mean(writers);
    if (!mean) return;
    const { original, inserted } = mean.maps;
    const sum = both(mean.maps);
    drawHeat(this.stage, this.image, this.attention, sum, largest(sum));
    const pair = [
      ["on original tokens", original, mean.original],
      ["on inserted tokens", mean.inserted > 0 ? inserted : null, mean.inserted],
    ];
    this.showPair(`Attention that writes “${word.text}”`, pair, largest(original, inserted));
    const total = mean.original + mean.inserted;
    const parts = mean.inserted > 0 ? `, ${percent(mean.original)} on original and ${percent(mean.inserted)} on inserted tokens` : "";
    const text = `“${word.text}”: ${percent(total)} of the attention that writes it is on the image${parts} (${percent(mean.even)} if spread evenly).`;
    this.setCaption(text);
    this.stage.setAttribute("aria-label", `The image with the attention that writes “${word.text}”`);
    if (focused) say(this.spoken, text);
  }

  // The caption keeps its greatest height at this width: words below it must not move away from under the pointer.
  setCaption(text) {
    const { caption } = this;
    const width = caption.clientWidth;
    const height = width === this.captionWidth ? caption.offsetHeight : 0;
    this.captionWidth = width;
    caption.style.minHeight = "";
    caption.textContent = text;
    caption.style.minHeight = `${Math.max(height, caption.offsetHeight)}px`;
  }

  // Two small maps on one scale: [title, map or null, share] each.
  showPair(heading, maps, most) {
    this.pair.hidden = false;
    this.pairTitle.textContent = heading;
    maps.forEach(([title, map, share], i) => {
      if (map) drawHeat(this.small[i], this.image, this.attention, map, most);
      else drawHeat(this.small[i], this.image, { rows: 1, cols: 1 }, [0], 1);
      const text = `${title}: ${map ? percent(share) : "none"}`;
      this.smallTitles[i].textContent = text;
      this.small[i].setAttribute("aria-label", `Attention map, ${text}`);
    });
  }
}

const NO_REFLECTION = "This answer has no reflection, so nothing is inserted.";
