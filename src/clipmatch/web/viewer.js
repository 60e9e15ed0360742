// One photograph on the whole screen, with what is known of it, what is like it, and why it matches.

import { el, iconButton, toast } from "./dom.js";
import { icon } from "./icons.js";
import { count, dateTimeOf, fileSize, percent, plural, spokenName, surenessInFull } from "./phrases.js";

/**
 * hooks: photos() that are listed, near() when their end comes near, act(name, photo), markOf(id), explain(photo, signal),
 * similarTo(photo, signal) -> photographs, moved(photo), closed(), question() -> the sentence or "", features.
 */
export class Viewer {
  constructor(dialog, hooks) {
    this.dialog = dialog;
    this.hooks = hooks;
    this.at = -1; // place in the list; of a photograph that is not in it, of the one it was reached from
    this.photo = null;
    this.asking = null; // AbortController of what is being loaded for this photograph
    this.build();
    dialog.addEventListener("keydown", (event) => this.key(event));
    dialog.addEventListener("close", () => this.left());
  }

  build() {
    const { features } = this.hooks;
    const act = (name) => () => this.hooks.act(name, this.photo);
    this.image = el("img", { class: "photo", alt: "", decoding: "async" });
    this.heat = el("img", { class: "heat", alt: "", hidden: true });
    this.gone = el("p", { class: "placeholder", hidden: true }, icon("gone"), "The file is gone or can’t be read");
    this.stage = el("div", { class: "stage" }, this.image, this.heat, this.gone);
    this.image.addEventListener("error", () => this.fail());
    this.title = el("h2");
    this.place = el("span", { class: "place" });
    this.tick = iconButton("tick", "More like this (t)", act("like"), { class: "icon tick" });
    this.cross = iconButton("close", "Less like this (x)", act("dislike"), { class: "icon cross" });
    this.why = iconButton("heat", "Why it matches (e)", () => this.toggleWhy(), { "aria-pressed": "false" });
    this.about = iconButton("info", "About it (i)", () => this.toggleInfo(), { "aria-pressed": "false" });
    this.original = el("a", { class: "icon", icon: "open", target: "_blank", rel: "noopener", "aria-label": "Open the photograph itself", title: "Open the photograph itself" });
    const bar = el(
      "div",
      { class: "bar" },
      iconButton("left", "Back to the photographs (Esc)", () => this.dialog.close(), { class: "icon back" }),
      el("div", { class: "names" }, this.title, this.place),
      features.refine && this.tick,
      features.refine && this.cross,
      iconButton("similar", "Similar photographs (s)", act("similar")),
      features.explain && this.why,
      this.original,
      this.about,
    );
    this.previous = iconButton("left", "Previous (left arrow)", () => this.step(-1), { class: "icon turn previous" });
    this.next = iconButton("right", "Next (right arrow)", () => this.step(1), { class: "icon turn next" });
    this.words = el("section", { class: "words", "aria-label": "Why it matches", "aria-live": "polite", hidden: true });
    this.info = el("aside", { class: "info", "aria-label": "About the photograph", hidden: true });
    this.strip = el("div", { class: "strip", role: "group", "aria-label": "Similar photographs" });
    const middle = el("div", { class: "middle" }, this.stage, this.previous, this.next, this.words);
    this.dialog.append(bar, middle, this.info, this.strip);
  }

  get isOpen() {
    return this.dialog.open;
  }

  /** Show a photograph: the one at a place in the list, or one that is not in it. */
  show(photo, at = this.at) {
    this.photo = photo;
    this.at = at;
    this.asking?.abort();
    this.asking = new AbortController();
    this.hideWhy();
    this.draw();
    if (!this.dialog.open) {
      this.dialog.showModal();
      this.dialog.focus();
    }
    this.hooks.moved(photo);
    this.loadSimilar(this.asking.signal);
    if (at >= this.hooks.photos().length - 3) this.hooks.near();
  }

  draw() {
    const { photo } = this;
    const listed = this.hooks.photos();
    this.gone.hidden = true;
    this.image.hidden = false;
    this.image.alt = spokenName(photo, "");
    this.image.src = photo.thumb; // is there already; the large one takes its place when it has come
    const large = new Image();
    large.onload = () => { if (this.photo === photo) this.image.src = photo.full; };
    large.onerror = () => { if (this.photo === photo) this.fail(); };
    large.src = photo.full;
    for (const near of [listed[this.at + 1]]) if (near) new Image().src = near.full;
    this.title.textContent = photo.caption || photo.name;
    this.place.textContent = listed[this.at]?.id === photo.id ? `${count(this.at + 1)} of ${count(listed.length)} shown` : "a similar photograph";
    this.original.href = photo.full;
    this.previous.disabled = this.at <= 0;
    this.next.disabled = this.at >= listed.length - 1;
    this.mark();
    this.drawInfo();
  }

  fail() {
    this.image.hidden = true;
    this.gone.hidden = false;
  }

  /** Show whether it is ticked or crossed. */
  mark() {
    if (!this.photo) return;
    const mark = this.hooks.markOf(this.photo.id);
    this.tick.setAttribute("aria-pressed", mark === "liked");
    this.cross.setAttribute("aria-pressed", mark === "disliked");
    this.dialog.dataset.mark = mark;
  }

  drawInfo() {
    const { photo } = this;
    const facts = [
      photo.caption && ["text", photo.caption],
      photo.taken && ["calendar", dateTimeOf(photo.taken)],
      photo.camera && ["camera", photo.camera],
      ["size", `${count(photo.width)} × ${count(photo.height)} pixels${photo.size ? `, ${fileSize(photo.size)}` : ""}`],
      ["folder", photo.path],
      photo.duplicates > 0 && ["stack", `${plural(photo.duplicates, "near-duplicate")} below it in the list`],
    ].filter(Boolean);
    const list = el("ul", {}, facts.map(([name, text]) => el("li", {}, icon(name), el("span", { text }))));
    const sure = photo.confidence !== null && photo.confidence !== undefined;
    this.info.replaceChildren(el("h3", { text: photo.name }), list);
    if (sure) {
      const meter = el("div", { class: "meter", role: "meter", "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * photo.confidence), "aria-label": "Confidence" }, el("i"));
      meter.firstChild.style.width = `${100 * photo.confidence}%`;
      this.info.append(el("h3", { text: "Confidence" }), meter, el("p", { text: surenessInFull(photo.confidence) }));
    } else if (photo.score !== null && photo.score !== undefined) {
      this.info.append(el("p", { text: `Likeness ${photo.score.toFixed(2)}: the cosine with what you look for; 1 is the same.` }));
    }
  }

  step(by) {
    const at = this.at + by;
    const photo = this.hooks.photos()[at];
    if (photo) this.show(photo, at);
  }

  toggleInfo() {
    this.info.hidden = !this.info.hidden;
    this.dialog.classList.toggle("with-info", !this.info.hidden);
    this.about.setAttribute("aria-pressed", !this.info.hidden);
  }

  async loadSimilar(signal) {
    const { photo } = this;
    this.strip.replaceChildren(...Array.from({ length: 8 }, () => el("span", { class: "bone" })));
    let found = [];
    try {
      found = await this.hooks.similarTo(photo, signal);
    } catch (error) {
      if (error.name === "AbortError") return;
    }
    if (signal.aborted) return;
    this.strip.replaceChildren(
      ...found.filter((other) => other.id !== photo.id).map((other) => {
        const image = el("img", { src: other.thumb, alt: "", loading: "lazy", decoding: "async", draggable: "false" });
        const listed = this.hooks.photos().findIndex((one) => one.id === other.id);
        return el("button", { type: "button", "aria-label": `Similar: ${spokenName(other, "")}`, title: other.name, onclick: () => this.show(other, listed < 0 ? this.at : listed) }, image);
      }),
    );
  }

  // Why it matches

  toggleWhy() {
    if (this.why.getAttribute("aria-pressed") === "true") this.hideWhy();
    else this.showWhy();
  }

  hideWhy() {
    this.why.setAttribute("aria-pressed", "false");
    this.heat.hidden = true;
    this.words.hidden = true;
    this.words.replaceChildren();
  }

  async showWhy() {
    const { photo } = this;
    const signal = this.asking.signal;
    if (!this.hooks.features.explain) return;
    if (!this.hooks.question()) {
      toast("Type what you look for first; then it can be shown where and by which words a photograph matches.");
      return;
    }
    this.why.setAttribute("aria-pressed", "true");
    this.words.hidden = false;
    this.words.replaceChildren(el("p", { class: "spinner", text: "Looking closely…" }));
    try {
      const found = await this.hooks.explain(photo, signal);
      if (this.photo !== photo || this.words.hidden) return;
      this.heat.src = found.image;
      this.heat.alt = `Heat map: where the photograph shows “${this.hooks.question()}”`;
      this.heat.hidden = false;
      this.drawWords(found);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.hideWhy();
      toast(error.message, { bad: true });
    }
  }

  drawWords({ words, score }) {
    const most = Math.max(...words.map(([, change]) => Math.abs(change)), 1e-6);
    const list = el("ul", {}, words.map(([word, change]) => {
      const bar = el("i", { class: change < 0 ? "against" : "" });
      bar.style.width = `${100 * Math.abs(change) / most}%`;
      const said = `${change < 0 ? "−" : "+"}${Math.abs(change).toFixed(3)}`;
      return el("li", { title: `Without “${word}” the likeness would be ${Math.abs(change).toFixed(3)} ${change < 0 ? "higher" : "lower"}` }, el("span", { text: word }), el("b", { "aria-hidden": "true" }, bar), el("span", { class: "figure", text: said }));
    }));
    const sure = this.photo.confidence === null || this.photo.confidence === undefined ? "" : `, confidence ${percent(this.photo.confidence)}`;
    this.words.replaceChildren(
      el("h3", { text: "What each word adds" }),
      list,
      el("p", { text: `Likeness ${score.toFixed(3)}${sure}. Bright places are those that fit the sentence best.` }),
    );
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const does = {
      ArrowLeft: () => this.step(-1),
      ArrowRight: () => this.step(1),
      t: () => this.hooks.act("like", this.photo),
      x: () => this.hooks.act("dislike", this.photo),
      s: () => this.hooks.act("similar", this.photo),
      e: () => this.toggleWhy(),
      i: () => this.toggleInfo(),
    }[event.key];
    if (!does) return;
    event.preventDefault();
    event.stopPropagation();
    does();
  }

  close() {
    if (this.dialog.open) this.dialog.close();
  }

  left() {
    this.asking?.abort();
    this.hideWhy();
    this.image.removeAttribute("src");
    this.hooks.closed(this.photo, this.at);
    this.photo = null;
  }
}
