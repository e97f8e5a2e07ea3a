// What is drawn over an image: the inserted tokens, or the attention on every token.

const SIDE = 560; // pixels of a drawing's longer side
const AGAIN = "#ffb000";

// Draws an image with its visual tokens: those of `selected` (a list of [row, column]) outlined, the others darkened.
export function drawSelected(canvas, image, { rows, cols, selected }) {
  const context = begin(canvas, image);
  const cells = new Set(selected.map(([row, col]) => row * cols + col));
  const [width, height] = [canvas.width / cols, canvas.height / rows];
  const each = (draw) => {
    for (let cell = 0; cell < rows * cols; cell++) {
      draw(cell, Math.round((cell % cols) * width), Math.round(Math.floor(cell / cols) * height));
    }
  };
  context.fillStyle = "rgba(12, 14, 30, 0.74)";
  each((cell, x, y) => cells.has(cell) || context.fillRect(x, y, Math.ceil(width), Math.ceil(height)));
  // The outline of the selected tokens, and thin lines between its tokens.
  const at = (row, col) => row >= 0 && row < rows && col >= 0 && col < cols && cells.has(row * cols + col);
  const edges = (inner) => {
    context.beginPath();
    for (let row = 0; row <= rows; row++) {
      for (let col = 0; col <= cols; col++) {
        const here = at(row, col);
        const [x, y] = [Math.round(col * width), Math.round(row * height)];
        const edge = (other, right, down) => {
          if (inner ? !(here && other) : here === other) return;
          context.moveTo(x, y);
          context.lineTo(x + right * width, y + down * height);
        };
        edge(at(row, col - 1), 0, 1);
        edge(at(row - 1, col), 1, 0);
      }
    }
    context.stroke();
  };
  context.strokeStyle = AGAIN;
  context.lineCap = "square";
  context.lineWidth = 1;
  edges(true);
  context.lineWidth = Math.max(3, Math.min(width, height) / 22);
  edges(false);
}

// Draws an image with a heat map (rows * cols shares); `most` is the share that is brightest.
export function drawHeat(canvas, image, { rows, cols }, heat, most) {
  const context = begin(canvas, image);
  for (let cell = 0; cell < rows * cols; cell++) {
    const [x, y] = [cell % cols, Math.floor(cell / cols)];
    const [left, top] = [Math.round((x * canvas.width) / cols), Math.round((y * canvas.height) / rows)];
    const [right, bottom] = [Math.round(((x + 1) * canvas.width) / cols), Math.round(((y + 1) * canvas.height) / rows)];
    context.fillStyle = heatColor(most > 0 ? heat[cell] / most : 0);
    context.fillRect(left, top, right - left, bottom - top);
  }
}

export function drawPlain(canvas, image) {
  begin(canvas, image);
}

export function drawThumbnail(canvas, image) {
  const scale = canvas.height / image.height;
  canvas.width = Math.round(image.width * scale);
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
}

function begin(canvas, image) {
  const scale = SIDE / Math.max(image.width, image.height);
  canvas.width = Math.round(image.width * scale);
  canvas.height = Math.round(image.height * scale);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = scale < 1;
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return context;
}

// Little attention darkens, much of it lights: from a dark violet to the image itself with a trace of amber.
const STOPS = [
  [14, 10, 40, 0.86],
  [84, 22, 96, 0.62],
  [214, 84, 60, 0.34],
  [255, 190, 70, 0.08],
];

export function heatColor(share) {
  const at = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
  const low = Math.min(Math.floor(at), STOPS.length - 2);
  const [r, g, b, a] = STOPS[low].map((value, i) => value + (at - low) * (STOPS[low + 1][i] - value));
  return `rgba(${Math.round(r)}, ${Math.round(g)}, ${Math.round(b)}, ${a.toFixed(3)})`;
}

export const largest = (...maps) => maps.reduce((most, map) => map.reduce((a, b) => Math.max(a, b), most), 0);
