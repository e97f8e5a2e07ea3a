// An answer as cards: one a section, an eye before each reflection, and words that can be chosen.

import { eye, h } from "./dom.js";
import { partsOf, wordsOf } from "./sections.js";

export class Cards {
  // Calls `onLook(number)` when an eye is chosen, `onWord(word, focused)` for a word under the pointer or in focus, and
  // `onWord(null)` when there is none any more. Looks are known while the answer streams only by their number.
  constructor({ inserts, most, onLook, onWord }) {
    Object.assign(this, { inserts, most, onLook, words: [], eyes: [], shown: [] });
    this.element = h("div", { class: "cards", "aria-busy": "true" });
    const word = (event) => this.words.find((one) => one.element === event.target);
    this.element.addEventListener("pointerover", (event) => word(event) && onWord(word(event), false));
    this.element.addEventListener("pointerout", (event) => word(event) && onWord(null));
    this.element.addEventListener("focusin", (event) => word(event) && onWord(word(event), true));
    this.element.addEventListener("focusout", (event) => word(event) && onWord(null));
    this.element.addEventListener("keydown", (event) => word(event) && this.step(event, this.words.indexOf(word(event))));
  }

  // The text so far; only the cards that changed are made anew.
  stream(text) {
    const parts = partsOf(text, true);
    let looks = 0;
    parts.forEach((part, i) => {
      const number = part.name === "REFLECTION" && this.inserts && looks < this.most ? looks++ : null;
      if (!this.shown[i] || this.shown[i].part.name !== part.name) {
        this.shown.splice(i).forEach(({ nodes }) => nodes.forEach((node) => node.remove()));
        const body = h("p", { class: "text" });
        const mark = number === null ? noLook(part) : [h("p", { class: "look pending" }, eye(), "looks again")];
        this.shown.push({ part, body, nodes: [...mark, card(part, body, number !== null)] });
        this.element.append(...this.shown[i].nodes);
      }
      this.shown[i].part = part;
      this.shown[i].body.textContent = part.text.trim();
    });
  }

  // The whole answer: looks are buttons, and words are elements. `insertions` as the server gives them.
  finish(text, insertions, looks) {
    this.element.replaceChildren();
    this.element.setAttribute("aria-busy", "false");
    this.words = [];
    this.eyes = [];
    for (const part of partsOf(text)) {
      const look = looks.findIndex((at) => part.name === "REFLECTION" && at + "<REFLECTION>".length === part.start);
      if (look >= 0) {
        const { selected_tokens: selected, visual_tokens: all } = insertions[look];
        const what = selected === all ? `all ${all}` : `${selected} of ${all}`;
        const button = h(
          "button",
          { type: "button", class: "look", "aria-pressed": "false", onclick: () => this.onLook(look) },
          eye(),
          `Look ${look + 1}: ${what} tokens inserted`,
        );
        this.eyes.push(button);
        this.element.append(button);
      } else {
        this.element.append(...noLook(part));
      }
      const body = h("p", { class: "text" });
      let at = part.start;
      for (const word of wordsOf(part)) {
        const element = h("span", { class: "word" }, word.text);
        body.append(text.slice(at, word.start), element);
        this.words.push({ ...word, element });
        at = word.end;
      }
      this.element.append(card(part, body, look >= 0));
    }
  }

  pressed(look) {
    this.eyes.forEach((button, i) => button.setAttribute("aria-pressed", String(i === look)));
  }

  // Once the attention of words is known: `shareOf(word)` is a share of it, from 0 to 1, or null.
  enable(shareOf) {
    const shares = this.words.map(shareOf);
    const most = Math.max(...shares.filter((share) => share !== null), 0.01);
    this.words.forEach(({ element }, i) => {
      element.tabIndex = i ? -1 : 0;
      element.style.setProperty("--heat", shares[i] === null ? 0 : (shares[i] / most).toFixed(3));
    });
    this.element.classList.add("ready");
  }

  step(event, index) {
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: this.words.length - 1 }[event.key];
    if (to === undefined || !this.words[to]) return;
    event.preventDefault();
    this.words[index].element.tabIndex = -1;
    this.words[to].element.tabIndex = 0;
    this.words[to].element.focus();
  }
}

// In the place of an eye, before a reflection without a look.
const noLook = (part) => (part.name === "REFLECTION" ? [h("p", { class: "no-look" }, "No look: nothing inserted")] : []);

function card(part, body, looked) {
  const name = part.name ?? "TEXT";
  const note = part.name === "REFLECTION" ? h("span", { class: "note" }, looked ? "with the image again" : "in text alone") : null;
  return h("section", { class: `card ${name.toLowerCase()}` }, h("h4", null, name), note, body);
}
