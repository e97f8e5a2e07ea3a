// The page: its controls, and what happens when a question is asked.

import * as api from "./api.js";
import { Attention } from "./attention.js";
import { byId, h, say } from "./dom.js";
import { toHtml } from "./export.js";
import { Panel } from "./panel.js";
import { InputImage } from "./input_image.js";
import { conclusionOf } from "./sections.js";
import { curl, python } from "./snippets.js";
import { drawThumbnail } from "./overlay.js";

const SEEDS_TRIED = 12;
const FILES = { "image/png": "image.png", "image/jpeg": "image.jpg", "image/webp": "image.webp" };

let settings = null;
let panels = [];
let running = null; // an AbortController
let before = null; // the last answer, to compare with after painting
const image = new InputImage(byId("image"), byId("ring"), () => {
  for (const canvas of document.querySelectorAll(".strip canvas")) drawThumbnail(canvas, image.canvas);
  showCode();
});

const number = (id) => Number(byId(id).value);
const mode = () => document.querySelector("[name=mode]:checked").value;
const modes = () => (mode() === "compare" ? ["none", "copy", "route"] : [mode()]);

function request(mode) {
  return {
    model: settings.model,
    messages: [
      {
        role: "user",
        content: [
          { type: "image_url", image_url: { url: image.url() } },
          { type: "text", text: byId("question").value },
        ],
      },
    ],
    temperature: number("temperature"),
    seed: number("seed"),
    max_tokens: number("tokens"),
    reattention: { mode, keep_ratio: number("keep"), max_insertions: number("looks") },
  };
}

// Asks in the chosen modes at once; then has the attention of each answer computed, where it is wanted.
async function ask(wanted = () => true) {
  hideError();
  const controller = busy();
  byId("no-reflection").hidden = byId("remark").hidden = true;
  const snapshot = h("canvas", { width: image.canvas.width, height: image.canvas.height });
  snapshot.getContext("2d").drawImage(image.canvas, 0, 0);
  const asked = modes().map((mode) => ({ body: request(mode), panel: null }));
  for (const one of asked) {
    const { reattention, seed, temperature } = one.body;
    const { mode, keep_ratio: keep, max_insertions: most } = reattention;
    one.panel = new Panel({ mode, keep, most, seed, temperature, question: byId("question").value, image: snapshot });
  }
  panels = asked.map(({ panel }) => panel);
  byId("panels").replaceChildren(...panels.map(({ element }) => element));
  byId("panels").classList.toggle("several", panels.length > 1);
  byId("intro").hidden = true;
  if (byId("result").getBoundingClientRect().top > innerHeight / 2) byId("result").scrollIntoView();
  say(byId("said"), "Answering");
  try {
    await Promise.all(asked.map((one) => answer(one, controller.signal)));
    tellConclusion();
    byId("export").hidden = false;
    byId("no-reflection").hidden = panels.some((panel) => panel.reflects());
    if (wanted()) for (const one of asked) await measure(one, controller.signal);
  } catch (error) {
    fail(error);
    controller.abort(); // the other answers
  } finally {
    idle(controller);
  }
}

async function answer({ body, panel }, signal) {
  const extras = { stream: true, return_token_ids: true, return_selection: true, separate_reasoning: false };
  panel.setState("answering", true);
  try {
    panel.finish(await api.chat({ ...body, ...extras }, (text) => panel.stream(text), signal));
    panel.setState("");
  } catch (error) {
    panel.setState(error.name === "AbortError" ? "stopped" : "");
    throw error;
  }
}

async function measure({ body, panel }, signal) {
  panel.setState("computing attention; the first time, its program is compiled", true);
  const { model, messages } = body;
  const { ids, insertions } = panel.answer;
  try {
    const result = await api.attention({ model, messages, token_ids: ids, insertions }, signal);
    panel.measured(new Attention(result));
    panel.setState("");
  } catch (error) {
    panel.setState(error.name === "AbortError" ? "attention not computed" : "");
    throw error;
  }
}

function tellConclusion() {
  const [panel] = panels;
  const conclusion = conclusionOf(panel.text) ?? panel.text;
  say(byId("said"), `Answered: ${conclusion}`);
  const { number: version, painted } = image;
  const now = { version, painted, conclusion, question: panel.question };
  const comparable = before && before.version === version && before.question === panel.question && painted && !before.painted;
  byId("remark").hidden = !comparable;
  if (comparable) byId("remark").textContent = `Without paint it answered “${before.conclusion}”, now “${conclusion}”.`;
  if (!painted) before = now;
}

// Asks with one seed after the other until an answer reflects.
async function seek() {
  for (let tried = 0; tried < SEEDS_TRIED; tried++) {
    if (number("temperature") === 0) byId("temperature").value = 1;
    byId("seed").value = (number("seed") + 1) % 2 ** 32;
    showCode();
    const reflects = () => panels.some((panel) => panel.reflects());
    await ask(reflects);
    if (reflects() || !panels.every((panel) => panel.answer)) return;
  }
  showError(`None of ${SEEDS_TRIED} seeds gave an answer with a reflection. Has this model been trained to write them?`);
}

function busy() {
  running?.abort();
  running = new AbortController();
  enable(false);
  byId("stop").hidden = false;
  return running;
}

function idle(controller) {
  if (running !== controller) return;
  running = null;
  enable(true);
  byId("stop").hidden = true;
}

// A button that is disabled for good would lose the focus of whoever pressed it.
function enable(on) {
  byId("go").setAttribute("aria-disabled", String(!on));
}

function fail(error) {
  if (error.name === "AbortError") return say(byId("said"), "Stopped");
  if (error.status === 401) {
    byId("key-row").hidden = false;
    byId("key").focus();
  }
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} seconds.` : "";
  showError(error.message + wait);
  if (!error.status && !(error instanceof api.ServerError)) throw error; // a fault of this page: to the console too
}

function showError(message) {
  byId("error").hidden = false;
  byId("error").textContent = message;
}

function hideError() {
  byId("error").hidden = true;
}

async function take(blob, name) {
  hideError();
  try {
    await image.load(blob, name);
    for (const button of byId("examples").children) button.setAttribute("aria-pressed", "false");
    togglePaint(false);
  } catch (error) {
    showError(error.message);
  }
}

async function takeExample(example, button) {
  const blob = await (await fetch(example.image)).blob();
  await take(blob, "The example");
  byId("question").value = example.question;
  byId("seed").value = example.seed;
  byId("temperature").value = example.temperature;
  button.setAttribute("aria-pressed", "true");
  showCode();
}

function togglePaint(on) {
  image.brush.turn(on);
  byId("paint").setAttribute("aria-pressed", String(on));
  byId("paint-tools").hidden = !on;
  byId("paint-color").value = image.brush.color;
  const label = on ? "Paint on the image: arrows move the brush, space paints" : "The image that is asked about";
  byId("image").setAttribute("aria-label", label);
}

function showCode() {
  byId("keep-shown").textContent = `${Math.round(100 * number("keep"))}%`;
  byId("keep-row").hidden = !["route", "compare"].includes(mode());
  if (!settings || !image.bitmap || !byId("code").open) return;
  const body = request(modes().at(-1));
  const media = body.messages[0].content[0].image_url.url.match(/^data:([^;]+)/)[1];
  const shown = { media, file: FILES[media], base: new URL("./", document.baseURI).href, key: settings.key };
  byId("save-image").textContent = shown.file;
  byId("curl").textContent = curl(body, shown);
  byId("python").textContent = python(body, shown);
}

async function copy(id) {
  try {
    await navigator.clipboard.writeText(byId(id).textContent);
    say(byId("copied"), "Copied");
    return true;
  } catch {
    // Where the page is not at localhost and without TLS, browsers have no clipboard: the text is selected instead.
    getSelection().selectAllChildren(byId(id));
    say(byId("copied"), "Selected; copy it with the keyboard");
    return false;
  }
}

function saveAs(blob, name) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function untilReady() {
  let state = await api.health();
  while (state !== "ready") {
    byId("server").textContent = state.includes("loading") ? "loading and compiling the model" : state;
    enable(false);
    await new Promise((resolve) => setTimeout(resolve, 1000));
    state = await api.health();
  }
  byId("server").textContent = `Model ${settings.model}: ready`;
  byId("server").classList.add("ready");
  enable(running === null);
}

function listen() {
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (byId("go").getAttribute("aria-disabled") !== "true") ask();
  });
  byId("ask").addEventListener("input", showCode);
  byId("code").addEventListener("toggle", showCode);
  byId("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("ask").requestSubmit();
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("seek").addEventListener("click", seek);
  byId("key").addEventListener("input", () => api.setKey(byId("key").value));
  byId("reseed").addEventListener("click", () => {
    byId("seed").value = Math.floor(Math.random() * 2 ** 32);
    showCode();
  });
  byId("pick").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => {
    const [file] = byId("file").files;
    if (file) take(file, file.name);
    byId("file").value = "";
  });
  const withFiles = (event) => event.dataTransfer.types.includes("Files") && (event.preventDefault(), true);
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => withFiles(event) && byId("drop").classList.add("over"));
  }
  for (const name of ["dragleave", "drop"]) document.addEventListener(name, () => byId("drop").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    const [file] = withFiles(event) ? event.dataTransfer.files : [];
    if (file) take(file, file.name);
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (!file || event.clipboardData.types.includes("text/plain")) return; // a text with an image of itself
    event.preventDefault();
    take(file, "What was pasted");
  });
  byId("paint").addEventListener("click", () => togglePaint(!image.brush.on));
  byId("paint-undo").addEventListener("click", () => image.brush.undo());
  byId("paint-clear").addEventListener("click", () => image.brush.clear());
  byId("paint-color").addEventListener("input", (event) => (image.brush.color = event.target.value));
  byId("paint-size").addEventListener("input", (event) => (image.brush.size = Number(event.target.value)));
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      if (!(await copy(button.dataset.copy))) return;
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
  }
  byId("save-image").addEventListener("click", () => {
    saveAs(image.blob(), byId("save-image").textContent);
  });
  byId("export").addEventListener("click", async () => {
    const css = await (await fetch("page/page.css")).text();
    saveAs(new Blob([toHtml(panels.filter((panel) => panel.answer), css)], { type: "text/html" }), "look_again.html");
  });
}

async function start() {
  listen();
  settings = await api.settings();
  byId("key-row").hidden = !settings.key;
  byId("embedded-note").hidden = !settings.embedded;
  if (!settings.embedded) byId("tokens").value = 1024;
  byId("looks").max = settings.max_insertions;
  byId("looks").value = settings.max_insertions;
  const buttons = settings.examples.map((example) => {
    const thumbnail = h("img", { src: example.image, alt: "", width: 56, height: 56 });
    const pressed = () => takeExample(example, button);
    const button = h("button", { type: "button", class: "example", "aria-pressed": "false", title: example.question, onclick: pressed }, thumbnail);
    button.append(h("span", { class: "unseen" }, `Example: ${example.question}`));
    return button;
  });
  byId("examples").replaceChildren(...buttons);
  await takeExample(settings.examples[0], buttons[0]);
  await untilReady();
}

start().catch((error) => showError(error.message));
