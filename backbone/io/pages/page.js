"use strict";
const at = name => document.getElementById(name);
const say = text => { at("message").textContent = text; };
const LOST = "The server does not answer. Everything so far is kept; start it again and open its new address.";

/* What is drawn with the mouse, a pen or a finger on a canvas, in one colour on nothing. `size` is that of the image below,
   which the canvas has several times; `lifted` is called behind every stroke, and after an undo. */
class Pen {
  static UNDO = 40;

  constructor(canvas, { ink, size: [width, height], room = 512, lifted = () => {} }) {
    Object.assign(this, { canvas, lifted, stroke: null, before: [] });
    this.zoom = Math.max(1, Math.round(room / width));
    [canvas.width, canvas.height] = [this.zoom * width, this.zoom * height];
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.context.strokeStyle = ink;
    this.context.lineCap = this.context.lineJoin = "round";
    canvas.addEventListener("pointerdown", event => this.begin(event));
    canvas.addEventListener("pointermove", event => this.follow(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.lift());
    for (const name of ["pen", "eraser"]) at(name).addEventListener("click", () => this.choose(name));
    at("undo").addEventListener("click", () => this.undo());
    at("clear").addEventListener("click", () => { this.remember(); this.wipe(); });
  }

  get erasing() { return at("eraser").getAttribute("aria-pressed") === "true"; }
  wipe() { this.context.clearRect(0, 0, this.canvas.width, this.canvas.height); }

  choose(tool) {
    for (const name of ["pen", "eraser"]) at(name).setAttribute("aria-pressed", String(name === tool));
  }

  remember() {
    this.before.push(this.context.getImageData(0, 0, this.canvas.width, this.canvas.height));
    if (this.before.length > Pen.UNDO) this.before.shift();
    at("undo").disabled = at("clear").disabled = false;
  }

  forget() {
    this.before = [];
    at("undo").disabled = true;
  }

  undo() {
    if (!this.before.length) return;
    this.context.putImageData(this.before.pop(), 0, 0);
    at("undo").disabled = !this.before.length;
    this.lifted();
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * this.canvas.width / box.width, (event.clientY - box.top) * this.canvas.height / box.height];
  }

  begin(event) {
    if (event.button) return;
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    this.remember();
    this.stroke = this.place(event);
    this.line(this.stroke);
  }

  follow(event) {
    if (!this.stroke) return;
    const all = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
    for (const one of all.length ? all : [event]) this.line(this.place(one));
  }

  line(to) {
    const context = this.context;
    context.globalCompositeOperation = this.erasing ? "destination-out" : "source-over";
    context.lineWidth = this.zoom * at("width").value * (this.erasing ? 2 : 1);
    context.beginPath();
    context.moveTo(...this.stroke);
    context.lineTo(...to);
    context.stroke();
    context.globalCompositeOperation = "source-over";
    this.stroke = to;
  }

  lift() {
    if (!this.stroke) return;
    this.stroke = null;
    this.lifted();
  }

  /* What is drawn, on paper of a colour, as a data URL of a PNG. */
  export(paper) {
    const whole = document.createElement("canvas");
    [whole.width, whole.height] = [this.canvas.width, this.canvas.height];
    const context = whole.getContext("2d");
    context.fillStyle = paper;
    context.fillRect(0, 0, whole.width, whole.height);
    context.drawImage(this.canvas, 0, 0);
    return whole.toDataURL("image/png");
  }
}

/* Requests of which only the newest counts; the bar shows how far it is. */
class Asking {
  constructor() { Object.assign(this, { newest: 0, running: 0 }); this.watch(); }

  /* The answer, or nothing where a newer request has come or the server refused, which is said. */
  async ask(where, body) {
    const mine = ++this.newest, besideOlder = this.running > 0;
    let answer = null;
    this.running += 1;
    say("");
    try {
      answer = await fetch(where, {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
      });
      if (mine === this.newest && answer.ok) return await answer.json();
      /* One that does not know this address is another server, which was started there since. */
      if (mine === this.newest) say(answer.status === 404 ? LOST : await answer.text());
    } catch {
      say(LOST);
    } finally {
      this.running -= 1;
      if (!this.running) at("progress").value = 0;
    }
    /* The server may turn to this request first, and then takes the older one for the newest. */
    return besideOlder && mine === this.newest && answer?.status === 409 ? this.ask(where, body) : null;
  }

  async watch() {
    if (this.running) {
      try { at("progress").value = (await (await fetch("done")).json()).done; } catch { /* said by ask */ }
    }
    setTimeout(() => this.watch(), 300);
  }
}

/* An <img> of the server's; one of a small image shows its pixels. */
function picture(source, alt, small) {
  const image = document.createElement("img");
  image.src = source;
  image.alt = alt;
  if (small) image.className = "small";
  return image;
}

/* A button with two images and words below, before all others. */
function keep(images, text, taken) {
  const button = document.createElement("button"), pair = document.createElement("div"), words = document.createElement("span");
  button.type = "button";
  button.className = "kept";
  pair.append(...images);
  words.textContent = text;
  words.dir = "auto";
  button.append(pair, words);
  button.addEventListener("click", taken);
  at("kept").prepend(button);
  at("title").hidden = false;
}

/* Images as large as a whole multiple of their width that there is room for. */
function fitTo(width) {
  const fit = () => {
    const times = Math.floor(document.querySelector("main section").clientWidth / width);
    document.body.style.setProperty("--whole", times ? `${times * width}px` : "100%");
  };
  window.addEventListener("resize", fit);
  fit();
}

function onKeys(act, pen) {
  document.addEventListener("keydown", event => {
    if (!event.ctrlKey && !event.metaKey) return;
    if (event.key === "Enter") { event.preventDefault(); act(); }
    else if (event.key === "z" && event.target.type !== "text") { event.preventDefault(); pen.undo(); }
  });
}
