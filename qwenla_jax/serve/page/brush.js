// Paint over the image: with a pointer, or with the arrow keys and space.

export class Brush {
  // `ring` is an element that shows where the brush is; `onChange` is called after each stroke and while it grows.
  constructor(canvas, ring, onChange) {
    Object.assign(this, { canvas, ring, onChange, strokes: [], on: false, color: "#808080", size: 0.12 });
    this.at = { x: 0.5, y: 0.5 }; // shares of width and height
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (this.stroke = null));
    canvas.addEventListener("pointerleave", () => this.showRing(false));
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("focus", () => this.showRing(this.on && canvas.matches(":focus-visible")));
    canvas.addEventListener("blur", () => this.showRing(false));
  }

  turn(on) {
    this.on = on;
    this.canvas.classList.toggle("painting", on);
    if (on) {
      this.canvas.tabIndex = 0;
      this.canvas.setAttribute("role", "application");
    } else {
      this.canvas.removeAttribute("tabindex");
      this.canvas.setAttribute("role", "img");
      this.showRing(false);
    }
  }

  undo() {
    this.strokes.pop();
    this.onChange();
  }

  clear() {
    this.strokes = [];
    this.onChange();
  }

  draw(context) {
    const { width, height } = this.canvas;
    context.lineCap = context.lineJoin = "round";
    for (const { color, size, points } of this.strokes) {
      context.strokeStyle = color;
      context.lineWidth = size * Math.max(width, height);
      context.beginPath();
      context.moveTo(points[0].x * width - 0.01, points[0].y * height); // a line of no length would leave no dab
      for (const { x, y } of points) context.lineTo(x * width, y * height);
      context.stroke();
    }
  }

  begin() {
    this.stroke = { color: this.color, size: this.size, points: [{ ...this.at }] };
    this.strokes.push(this.stroke);
    this.onChange();
  }

  press(event) {
    if (!this.on) return;
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    this.locate(event);
    this.begin();
  }

  move(event) {
    if (!this.on) return;
    this.locate(event);
    this.showRing(true);
    if (!this.stroke) return;
    this.stroke.points.push({ ...this.at });
    this.onChange();
  }

  key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!this.on || (!step && event.key !== " " && event.key !== "Enter")) return;
    event.preventDefault();
    if (step) {
      const far = this.size / (event.shiftKey ? 4 : 2);
      this.at = { x: within(this.at.x + step[0] * far), y: within(this.at.y + step[1] * far) };
    } else {
      this.begin();
      this.stroke = null;
    }
    this.showRing(true);
  }

  locate(event) {
    const box = this.canvas.getBoundingClientRect();
    this.at = { x: within((event.clientX - box.left) / box.width), y: within((event.clientY - box.top) / box.height) };
  }

  showRing(shown) {
    this.ring.hidden = !shown;
    if (!shown) return;
    const { clientWidth, clientHeight, offsetLeft, offsetTop } = this.canvas;
    const side = this.size * Math.max(clientWidth, clientHeight);
    Object.assign(this.ring.style, {
      left: `${offsetLeft + this.at.x * clientWidth - side / 2}px`,
      top: `${offsetTop + this.at.y * clientHeight - side / 2}px`,
      width: `${side}px`,
      height: `${side}px`,
    });
  }
}

const within = (share) => Math.min(Math.max(share, 0), 1);
