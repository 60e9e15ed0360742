// Paint it: a prompt, the picture as it comes about, and the photographs nearest to it.

import { el, iconButton, toast } from "./dom.js";
import { plural, spokenName } from "./phrases.js";

/** hooks: paint(question, onEvent, signal) -> what is finished, remember(photographs), open(photograph), searchBy(file). */
export class Easel {
  constructor(dialog, hooks) {
    this.dialog = dialog;
    this.hooks = hooks;
    this.painting = null; // AbortController of what is under way
    this.build();
    dialog.addEventListener("close", () => this.painting?.abort());
    dialog.addEventListener("keydown", (event) => event.stopPropagation()); // the page's keys are not meant
  }

  build() {
    this.prompt = el("input", { type: "text", maxlength: 1000, required: true, spellcheck: "false", "aria-label": "What the picture should show", placeholder: "a red circle above a blue square" });
    this.seed = el("input", { type: "number", min: 0, max: 2147483647, step: 1, required: true, value: 0 });
    this.steps = el("input", { type: "number", min: 0, max: 1000, step: 1, placeholder: "usual" });
    this.go = el("button", { class: "primary", text: "Paint" });
    this.stop = el("button", { type: "button", text: "Stop", hidden: true, onclick: () => this.painting?.abort() });
    this.form = el(
      "form",
      { class: "asked", onsubmit: (event) => { event.preventDefault(); this.start(); } },
      this.prompt,
      el("label", { title: "The same seed paints the same picture" }, el("span", { text: "Seed" }), this.seed),
      el("label", { title: "Of guidance: how long the picture is made more like the sentence" }, el("span", { text: "Steps" }), this.steps),
      this.go,
      this.stop,
    );
    this.picture = el("img", { class: "painting", alt: "", hidden: true });
    this.bar = el("progress", { max: 1, value: 0, "aria-label": "Painted so far", hidden: true });
    this.said = el("p", { class: "hint", role: "status", "aria-live": "polite" });
    this.actions = el("div", { class: "actions", hidden: true });
    this.near = el("section", { class: "near", "aria-label": "The nearest photographs", hidden: true });
    this.dialog.append(
      el("div", { class: "head" }, el("h2", { text: "Paint it" }), iconButton("close", "Close (Esc)", () => this.dialog.close())),
      el("div", { class: "body" }, this.form, el("div", { class: "easel" }, this.picture, this.bar, this.said), this.actions, this.near),
    );
    this.dialog.onclick = (event) => { if (event.target === this.dialog) this.dialog.close(); };
  }

  /** Open with a sentence, which is not painted before it is asked for. */
  open(sentence) {
    if (!this.painting && sentence) this.prompt.value = sentence;
    if (!this.said.textContent) this.said.textContent = "A sentence, or several with weights: a bus | snow:0.5 | blur:-0.5";
    this.dialog.showModal();
    this.prompt.select();
  }

  async start() {
    this.painting?.abort();
    const turn = (this.painting = new AbortController());
    const prompt = this.prompt.value.trim();
    this.working(true);
    this.actions.hidden = this.near.hidden = true;
    this.said.textContent = "Mixing the colours…";
    try {
      const question = { prompt, seed: this.seed.valueAsNumber || 0, steps: this.steps.value === "" ? null : this.steps.valueAsNumber };
      const made = await this.hooks.paint(question, (event) => this.follow(event, prompt), turn.signal);
      if (this.painting === turn) this.finish(made, prompt);
    } catch (error) {
      if (this.painting !== turn) return;
      const left = error.name === "AbortError";
      this.said.textContent = left ? "Stopped." : error.message;
      if (!left && !this.dialog.open) toast(error.message, { bad: true });
    } finally {
      if (this.painting === turn) {
        this.painting = null;
        this.working(false);
      }
    }
  }

  working(on) {
    this.go.hidden = on;
    this.stop.hidden = !on;
    this.bar.hidden = !on;
    this.bar.removeAttribute("value"); // on its way, and nobody knows how far
    this.dialog.setAttribute("aria-busy", on);
  }

  follow({ step, steps, image }, prompt) {
    if (!image) return;
    this.show(image, `What is painted of “${prompt}” so far`);
    if (steps) this.bar.value = step / steps;
    this.said.textContent = `Step ${step} of ${steps}`;
  }

  show(image, alt) {
    this.picture.src = image;
    this.picture.alt = alt;
    this.picture.hidden = false;
  }

  finish({ image, score, seed, nearest }, prompt) {
    this.show(image, `A painting of “${prompt}”`);
    this.said.textContent = `Likeness ${score.toFixed(3)} by the model that guided it; seed ${seed}.`;
    this.actions.hidden = false;
    const another = el("button", { type: "button", text: "Another", title: "The next seed", onclick: () => { this.seed.value = seed + 1; this.start(); } });
    const search = el("button", { type: "button", text: "Search by it", onclick: () => {
      // Not by fetch: the page may ask its server alone.
      const data = Uint8Array.from(atob(image.split(",")[1]), (letter) => letter.charCodeAt(0));
      this.dialog.close();
      this.hooks.searchBy(new File([data], "painting.png", { type: "image/png" }));
    } });
    const save = el("a", { class: "button", href: image, download: `painting-${seed}.png`, text: "Save" });
    this.actions.replaceChildren(another, search, save);
    this.near.hidden = !nearest.length;
    this.near.replaceChildren(
      el("h3", { text: `The nearest ${plural(nearest.length, "photograph")} of the collection` }),
      el("div", { class: "strip" }, this.hooks.remember(nearest).map((photo) =>
        el("button", { type: "button", title: photo.name, "aria-label": `Near: ${spokenName(photo, "")}`, onclick: () => { this.dialog.close(); this.hooks.open(photo); } }, el("img", { src: photo.thumb, alt: "", loading: "lazy" })))),
    );
  }
}
