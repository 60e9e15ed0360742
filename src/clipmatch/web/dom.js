// Elements, without HTML in strings: what comes from files is text and stays text.

import { icon } from "./icons.js";

/** An element. Attributes: on… are listeners, true and false are present and absent, text is its text. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("aria-")) made.setAttribute(name, value);
    else if (value === false) continue;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "text") made.textContent = value;
    else if (name === "icon") made.prepend(icon(value));
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export const byId = (id) => document.getElementById(id);

/** A button with an icon, whose label is also its tooltip. */
export function iconButton(name, label, onclick, attributes = {}) {
  return el("button", { type: "button", class: "icon", icon: name, "aria-label": label, title: label, onclick, ...attributes });
}

/** Give each element with data-icon its icon. */
export function fillIcons(root = document) {
  for (const place of root.querySelectorAll("[data-icon]")) place.prepend(icon(place.dataset.icon));
}

/** A sentence at the edge of the page, for a while; with an action, a button. */
export function toast(sentence, { bad = false, action = null, label = "" } = {}) {
  const made = el("div", { class: bad ? "toast bad" : "toast" }, el("span", { text: sentence }));
  if (action) made.append(el("button", { type: "button", class: "link", text: label, onclick: () => { made.remove(); action(); } }));
  const region = byId("toasts");
  region.append(made);
  while (region.children.length > 3) region.firstChild.remove();
  setTimeout(() => made.remove(), bad || action ? 9000 : 5000);
}

/** Whether a key press belongs to what is being typed. */
export function isTyping(event) {
  return event.target instanceof Element && event.target.closest("input, textarea, select, [contenteditable]") !== null;
}

/** Whether a file is a picture, as far as its type or name tells. */
export function isPicture(file) {
  return file.type.startsWith("image/") || /\.(heic|heif|hif|dng|nef|cr2|cr3|arw|orf|raf|rw2|tiff?)$/i.test(file.name);
}
