// The image that is asked about: from a file, the clipboard or an example, on a canvas that can be painted on.

import { Brush } from "./brush.js";

const SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp"];
const LARGEST_SIDE = 2048; // pixels; larger images are shrunk here, since the model shrinks them anyway
const LARGEST_FILE = 8 << 20;

export class InputImage {
  // `onChange` is called whenever there is another image, or it was painted on.
  constructor(canvas, ring, onChange) {
    this.canvas = canvas;
    this.onChange = onChange;
    this.number = 0; // of the image, without paint
    this.original = null;
    this.brush = new Brush(canvas, ring, () => {
      this.draw();
      this.onChange();
    });
  }

  get painted() {
    return this.brush.strokes.length > 0;
  }

  // Raises an Error with a message for people where the blob is no image.
  async load(blob, name) {
    let bitmap;
    try {
      bitmap = await createImageBitmap(blob);
    } catch {
      throw new Error(`${name} is no image that this browser can open. Choose a PNG, JPEG or WebP file.`);
    }
    const scale = Math.min(1, LARGEST_SIDE / Math.max(bitmap.width, bitmap.height));
    this.canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    this.canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    this.bitmap = bitmap;
    this.number += 1;
    this.brush.strokes = [];
    this.draw();
    const unchanged = SENT_AS_THEY_ARE.includes(blob.type) && blob.size <= LARGEST_FILE && scale === 1;
    this.original = unchanged ? await dataUrl(blob) : null;
    this.brush.color = this.edgeColor();
    this.onChange();
  }

  draw() {
    const context = this.canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "#fff"; // as the server shows what is transparent
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    context.drawImage(this.bitmap, 0, 0, this.canvas.width, this.canvas.height);
    this.brush.draw(context);
  }

  // What is sent: the file itself where nothing was painted or shrunk.
  url() {
    return !this.painted && this.original ? this.original : this.canvas.toDataURL("image/png");
  }

  blob() {
    const [head, data] = this.url().split(",");
    const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
    return new Blob([bytes], { type: head.slice(5, head.indexOf(";")) });
  }

  // The mean colour of the image's edge: paint of that colour makes a thing vanish into its ground.
  edgeColor() {
    const { width, height } = this.canvas;
    const pixels = this.canvas.getContext("2d").getImageData(0, 0, width, height).data;
    const sum = [0, 0, 0];
    let count = 0;
    const add = (x, y) => {
      for (let c = 0; c < 3; c++) sum[c] += pixels[4 * (y * width + x) + c];
      count += 1;
    };
    for (let x = 0; x < width; x++) for (const y of [0, height - 1]) add(x, y);
    for (let y = 0; y < height; y++) for (const x of [0, width - 1]) add(x, y);
    return "#" + sum.map((value) => Math.round(value / count).toString(16).padStart(2, "0")).join("");
  }
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}
