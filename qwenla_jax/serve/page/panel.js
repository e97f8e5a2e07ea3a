// One answer: its cards, and beside them the image with what was looked at.

import { both } from "./attention.js";
import { Cards } from "./cards.js";
import { chart } from "./chart.js";
import { h, percent, say } from "./dom.js";
import { reflectionsOf } from "./sections.js";
import { drawHeat, drawPlain, drawSelected, largest } from "./veil.js";

export const TITLES = { none: "No re-attention", copy: "COPY", route: "ROUTE" };

export class Panel {
  // `asked`: { mode, keep, question, seed, temperature, most, picture }, `picture` a canvas that stays as it is.
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
    this.pair = h("div", { class: "pair", hidden: true }, this.small.map((one, i) => h("figure", null, one, this.smallTitles[i])));
    this.caption = h("figcaption", { class: "caption" });
    this.spoken = h("p", { class: "unseen", role: "status" });
    this.state = h("p", { class: "state", role: "status" });
    this.line = h("div", { class: "line" });
    const kept = this.mode === "route" ? `keeps ${Math.round(100 * this.keep)}%` : inserts ? "keeps all" : "text alone";
    this.title = `${TITLES[this.mode]}: ${kept}`;
    this.footer = h("p", { class: "footer" });
    this.element = h(
      "article",
      { class: "panel", "aria-label": this.title },
      h("h3", null, TITLES[this.mode], h("span", { class: "note" }, kept)),
      h("div", { class: "see" }, h("figure", { class: "stage" }, this.stage, this.caption), this.pair, this.line, this.state, this.spoken),
      h("div", { class: "said" }, this.cards.element, this.footer),
    );
    drawPlain(this.stage, this.picture);
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
  tell(state, busy = false) {
    this.state.textContent = state;
    this.state.classList.toggle("busy", busy);
  }

  measured(attention) {
    this.attention = attention;
    const points = attention.shares.slice(0, -1); // the last token writes none
    const looks = attention.insertions.map((one) => one.position);
    const { element, mark } = chart(points, looks, Math.max(this.line.clientWidth, 260));
    this.mark = mark;
    const key = (kind, text) => h("li", { class: kind }, text);
    this.line.replaceChildren(
      h("h4", null, "Attention on the image along the answer"),
      element,
      h(
        "ul",
        { class: "legend" },
        key("original", "original tokens"),
        looks.length ? key("inserted", "inserted tokens") : null,
        key("even", "if spread evenly"),
      ),
    );
    this.cards.enable((word) => {
      const found = attention.mean(attention.writersOf(word));
      return found && found.original + found.inserted;
    });
    this.choose(this.look);
  }

  // Shows a look, or with null the image alone; returns what there is to say of it.
  choose(look) {
    this.look = look;
    this.cards.pressed(look);
    this.mark?.();
    if (look === null) return this.showImage();
    const { selected_tokens: kept, visual_tokens: all, images } = this.answer.insertions[look];
    drawSelected(this.stage, this.picture, images[0]);
    const again = kept === all ? `All ${all} visual tokens stand` : `The ${kept} most attended of ${all} visual tokens stand`;
    let caption = `${again} again before ${this.looks.length > 1 ? `reflection ${look + 1}` : "the reflection"}.`;
    if (this.attention) {
      const { before, after } = this.attention.ofLook(look, this.text);
      const most = largest(...[before, after].filter(Boolean).map(({ maps }) => both(maps)));
      this.showPair(
        [
          ["before the look", before && both(before.maps), before && before.original + before.inserted],
          ["in the reflection", both(after.maps), after.original + after.inserted],
        ],
        most,
      );
      caption += ` While it reflects, ${percent(after.original)} of its attention goes to the original tokens and ${percent(after.inserted)} to the inserted ones.`;
    }
    this.caption.textContent = caption;
    this.stage.setAttribute("aria-label", `The image with the tokens that stand again: ${kept} of ${all}`);
    return caption;
  }

  showImage() {
    drawPlain(this.stage, this.picture);
    this.stage.setAttribute("aria-label", "The image");
    this.pair.hidden = true;
    const seen = this.reflects() ? "The reflection is text alone: nothing stands again." : NO_REFLECTION;
    return (this.caption.textContent = seen + (this.attention ? " Choose a word to see where it looks." : ""));
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
    const found = this.attention.mean(writers);
    if (!found) return;
    const { original, inserted } = found.maps;
    const sum = both(found.maps);
    drawHeat(this.stage, this.picture, this.attention, sum, largest(sum));
    const pair = [
      ["on original tokens", original, found.original],
      ["on inserted tokens", found.inserted > 0 ? inserted : null, found.inserted],
    ];
    this.showPair(pair, largest(original, inserted));
    const total = found.original + found.inserted;
    const text = `“${word.text}”: ${percent(total)} of the attention that writes it is on the image (${percent(found.even)} if spread evenly).`;
    this.caption.textContent = text;
    this.stage.setAttribute("aria-label", `The image with the attention that writes “${word.text}”`);
    if (focused) say(this.spoken, `${text} ${percent(found.original)} original, ${percent(found.inserted)} inserted.`);
  }

  // Two small maps on one scale: [title, map or null, share] each.
  showPair(maps, most) {
    this.pair.hidden = false;
    maps.forEach(([title, map, share], i) => {
      if (map) drawHeat(this.small[i], this.picture, this.attention, map, most);
      else drawHeat(this.small[i], this.picture, { rows: 1, cols: 1 }, [0], 1);
      const text = `${title}: ${map ? percent(share) : "none"}`;
      this.smallTitles[i].textContent = text;
      this.small[i].setAttribute("aria-label", `Attention map, ${text}`);
    });
  }
}

const NO_REFLECTION = "This answer has no reflection, so nothing stands again.";
