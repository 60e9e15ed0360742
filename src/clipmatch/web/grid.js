// The grid of photographs. Only rows near the screen exist as elements, so it stays smooth with any number of them.

import { el, iconButton } from "./dom.js";
import { icon } from "./icons.js";
import { firstBelow, justify } from "./layout.js";
import { percent, spokenName, surenessInFull } from "./phrases.js";

const GAP = 4;

/**
 * hooks: open(index), act(name, index), near() when the end comes near, markOf(id) -> "liked", "disliked" or "",
 * features.
 */
export class Grid {
  constructor(host, hooks) {
    this.host = host;
    this.hooks = hooks;
    this.photos = [];
    this.headingOf = () => null;
    this.rows = [];
    this.drawn = new Map(); // place of a row -> its element
    this.active = 0; // the photograph that Tab leads to
    host.addEventListener("click", (event) => this.click(event));
    host.addEventListener("keydown", (event) => this.key(event));
    host.addEventListener("focusin", (event) => this.focused(event));
    let waiting = false;
    const later = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; this.draw(); });
    };
    addEventListener("scroll", later, { passive: true });
    addEventListener("resize", later);
    new ResizeObserver(() => { if (host.clientWidth !== this.width) this.layout(); }).observe(host);
  }

  /** Show these photographs instead; Tab leads to the one at `active`. */
  show(photos, headingOf = () => null, active = 0) {
    this.photos = photos;
    this.headingOf = headingOf;
    this.active = active;
    this.layout();
  }

  /** Show more of them below. */
  extend(photos) {
    this.photos = this.photos.concat(photos);
    this.layout();
  }

  /** Work out the rows, and draw those that can be seen. */
  layout() {
    const had = this.host.contains(document.activeElement);
    this.width = this.host.clientWidth;
    const wanted = this.width < 560 ? 118 : this.width < 1100 ? 180 : 220;
    const { rows, height } = justify(this.photos, this.width, wanted, GAP, this.headingOf);
    this.rows = rows;
    this.host.style.height = `${height}px`;
    this.host.setAttribute("aria-rowcount", rows.length);
    for (const row of this.drawn.values()) row.remove();
    this.drawn.clear();
    this.draw();
    if (had && this.photos.length) this.tile(this.active)?.focus({ preventScroll: true });
  }

  /** Make the rows that are near the screen, drop the others. */
  draw() {
    if (!this.rows.length) return;
    const top = -this.host.getBoundingClientRect().top;
    const view = innerHeight;
    const first = firstBelow(this.rows, top - view);
    let last = first;
    while (last < this.rows.length && this.rows[last].top < top + 2 * view) last++;
    for (const [place, row] of this.drawn) {
      if ((place < first || place >= last) && !row.contains(document.activeElement)) {
        row.remove();
        this.drawn.delete(place);
      }
    }
    for (let place = first; place < last; place++) this.drawRow(place);
    if (last >= this.rows.length - 4) this.hooks.near();
  }

  drawRow(place) {
    if (this.drawn.has(place)) return;
    const row = this.rows[place];
    const made = row.heading === undefined ? this.makeRow(row) : el("div", { role: "row", class: "row heading" }, el("div", { role: "gridcell" }, el("h2", { text: row.heading })));
    made.setAttribute("aria-rowindex", place + 1);
    made.style.transform = `translateY(${row.top}px)`;
    made.style.height = `${row.height}px`;
    const after = [...this.drawn.keys()].filter((other) => other > place);
    this.host.insertBefore(made, after.length ? this.drawn.get(Math.min(...after)) : null); // in reading order
    this.drawn.set(place, made);
  }

  makeRow(row) {
    const made = el("div", { role: "row", class: "row" });
    for (let at = row.from; at < row.to; at++) made.append(this.makeTile(at, row.widths[at - row.from]));
    return made;
  }

  makeTile(at, width) {
    const photo = this.photos[at];
    const { refine } = this.hooks.features;
    const image = el("img", { src: photo.thumb, alt: "", loading: "lazy", decoding: "async", draggable: "false" });
    const tile = el("div", { class: "tile", role: "gridcell", tabindex: at === this.active ? 0 : -1, "data-index": at }, image);
    tile.style.width = `${width}px`;
    if (!image.complete) image.classList.add("coming");
    image.addEventListener("load", () => image.classList.remove("coming"));
    image.addEventListener("error", () => {
      tile.classList.add("gone");
      image.replaceWith(el("span", { class: "placeholder" }, icon("gone"), el("span", { text: "The file is gone or can’t be read" }), el("small", { text: photo.name })));
    });
    tile.append(el("span", { class: "label", text: photo.caption || photo.name }));
    if (refine) {
      tile.append(
        iconButton("tick", "More like this (t)", null, { "data-act": "like", tabindex: -1, class: "icon mark tick" }),
        iconButton("close", "Less like this (x)", null, { "data-act": "dislike", tabindex: -1, class: "icon mark cross" }),
      );
    }
    tile.append(iconButton("similar", "Similar photographs (s)", null, { "data-act": "similar", tabindex: -1, class: "icon mark similar" }));
    if (photo.duplicates) {
      tile.append(el("span", { class: "copies", title: `${photo.duplicates} near-duplicates below it`, text: `+${photo.duplicates}` }));
    }
    if (photo.confidence !== null && photo.confidence !== undefined) {
      const bar = el("span", { class: "sure", title: surenessInFull(photo.confidence), "data-percent": percent(photo.confidence) }, el("i"));
      bar.firstChild.style.width = `${100 * Math.sqrt(photo.confidence)}%`; // the root: most that is of interest lies below a half
      tile.append(bar);
    }
    this.markTile(tile, photo);
    return tile;
  }

  /** Show on a tile whether it is ticked or crossed. */
  markTile(tile, photo) {
    const mark = this.hooks.markOf(photo.id);
    tile.classList.toggle("liked", mark === "liked");
    tile.classList.toggle("disliked", mark === "disliked");
    tile.setAttribute("aria-label", spokenName(photo, mark));
    if (this.hooks.features.refine) tile.setAttribute("aria-selected", mark === "liked");
    tile.querySelector(".tick")?.setAttribute("aria-pressed", mark === "liked");
    tile.querySelector(".cross")?.setAttribute("aria-pressed", mark === "disliked");
  }

  /** The same on all that are drawn. */
  markAll() {
    for (const tile of this.host.querySelectorAll(".tile")) this.markTile(tile, this.photos[Number(tile.dataset.index)]);
  }

  /** The element of a photograph, if it is drawn. */
  tile(at) {
    return this.host.querySelector(`.tile[data-index="${at}"]`);
  }

  /** Go to a photograph: scroll there if need be, and focus it. */
  focus(at = this.active) {
    if (!this.photos.length) return;
    at = Math.min(Math.max(at, 0), this.photos.length - 1);
    const place = this.placeOf(at);
    const row = this.rows[place];
    const header = document.getElementById("top").offsetHeight;
    const y = this.host.getBoundingClientRect().top + row.top;
    if (y < header + 8) scrollBy(0, y - header - (this.rows[place - 1]?.heading === undefined ? 8 : 60));
    else if (y + row.height > innerHeight - 8) scrollBy(0, y + row.height - innerHeight + 8);
    this.drawRow(place);
    this.tile(at).focus({ preventScroll: true });
  }

  /** Which row a photograph is in. */
  placeOf(at) {
    let low = 0;
    let high = this.rows.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.rows[middle].to > at) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  focused(event) {
    const tile = event.target.closest(".tile");
    if (!tile) return;
    this.tile(this.active)?.setAttribute("tabindex", -1);
    this.active = Number(tile.dataset.index);
    tile.setAttribute("tabindex", 0);
  }

  click(event) {
    const tile = event.target.closest(".tile");
    if (!tile) return;
    const button = event.target.closest("[data-act]");
    if (button) this.hooks.act(button.dataset.act, Number(tile.dataset.index));
    else this.hooks.open(Number(tile.dataset.index));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !event.target.closest(".tile")) return;
    const to = this.target(event.key);
    if (to !== null) this.focus(to);
    else if (event.key === "Enter" && !event.target.closest("[data-act]")) this.hooks.open(this.active);
    else return;
    event.preventDefault();
  }

  /** Where a key leads; null if it is of no such kind. */
  target(key) {
    if (key === "ArrowRight") return this.active + 1;
    if (key === "ArrowLeft") return this.active - 1;
    if (key === "Home") return 0;
    if (key === "End") return this.photos.length - 1;
    if (key === "ArrowDown") return this.beside(1);
    if (key === "ArrowUp") return this.beside(-1);
    return null;
  }

  /** The photograph above or below. */
  beside(step) {
    const here = this.rows[this.placeOf(this.active)];
    let place = this.placeOf(this.active) + step;
    while (this.rows[place] && this.rows[place].heading !== undefined) place += step;
    const there = this.rows[place];
    if (!there) return this.active;
    const middleOf = (row, at) => row.widths.slice(0, at - row.from).reduce((sum, width) => sum + width + GAP, 0) + row.widths[at - row.from] / 2;
    const middle = middleOf(here, this.active);
    let best = there.from;
    for (let at = there.from; at < there.to; at++) {
      if (Math.abs(middleOf(there, at) - middle) < Math.abs(middleOf(there, best) - middle)) best = at;
    }
    return best;
  }
}

/** Grey rows where photographs will be. */
export function skeleton() {
  const aspects = [1.5, 0.75, 1.33, 1.78, 1, 0.66, 1.5, 1.33, 0.75, 1.5, 1.6, 1, 1.5, 0.8, 1.33, 1.5, 0.75, 1.78, 1.2, 1.5];
  return aspects.map((aspect) => {
    const made = el("span");
    made.style.flex = `${aspect} 1 ${aspect * 170}px`;
    return made;
  });
}
