// What opens beside the photographs: filters, a concept, the collection in figures, the keys.

import { el, iconButton } from "./dom.js";
import { icon } from "./icons.js";
import { count, dateOf, fileSize, percent, plural, precisionInFull, sureness } from "./phrases.js";

// Filters ------------------------------------------------------------------------------------------------------------

/** A date so many days later; "" stays "". */
function shifted(date, days) {
  if (!date) return "";
  const moment = new Date(`${date}T12:00:00Z`);
  moment.setUTCDate(moment.getUTCDate() + days);
  return moment.toISOString().slice(0, 10);
}

const SIDES = [[0, "any"], [480, "480 pixels"], [1080, "1080 pixels"], [2160, "2160 pixels"]];
const SIZES = [[0, "any"], [200_000, "200 kB"], [1_000_000, "1 MB"], [5_000_000, "5 MB"]];

function choice(label, options, chosen, onchange) {
  const select = el("select", { onchange: () => onchange(select.value) }, options.map(([value, text]) => el("option", { value, text, selected: String(value) === String(chosen || options[0][0]) })));
  return el("label", {}, el("span", { text: label }), select);
}

function check(label, on, onchange, hint = "") {
  const box = el("input", { type: "checkbox", checked: on, onchange: () => onchange(box.checked) });
  return el("label", { class: "check", title: hint }, box, el("span", { text: label }));
}

/** Fill the panel of filters. asked: the question; change(patch): asks with other values; known: {cameras, folders}. */
export function fillFilters(panel, asked, features, known, change) {
  const { where } = asked;
  const put = (key, value) => {
    const left = { ...where, [key]: value };
    if (!value) delete left[key];
    change({ where: left });
  };
  const date = (label, value, onchange) => {
    const input = el("input", { type: "date", value, onchange: () => onchange(input.value) });
    return el("label", {}, el("span", { text: label }), input);
  };
  const parts = [];
  if (features.filters) {
    const cameras = el("datalist", { id: "cameras" }, known.cameras.map(([name]) => el("option", { value: name })));
    const camera = el("input", { type: "text", list: "cameras", value: where.camera ?? "", maxlength: 200, placeholder: "any", onchange: () => put("camera", camera.value.trim()) });
    parts.push(
      el("div", { class: "pair" }, date("Taken from", where.after ?? "", (value) => put("after", value)), date("to", shifted(where.before, -1), (value) => put("before", shifted(value, 1)))),
      ...(features.camera === false ? [] : [el("label", {}, el("span", { text: "Camera" }), camera, cameras)]),
      el("div", { class: "pair" }, choice("Shorter side, at least", SIDES, where.minSide, (value) => put("minSide", Number(value))), choice("File, at least", SIZES, where.minSize, (value) => put("minSize", Number(value)))),
    );
    if (known.folders.length > 1) {
      parts.push(choice("Folder", [["", "all"], ...known.folders.map((folder) => [folder, folder])], where.folder ?? "", (value) => put("folder", value)));
    }
    parts.push(check("Has a caption", Boolean(where.hasCaption), (on) => put("hasCaption", on)));
  }
  if (features.hybrid) {
    parts.push(check("Words of captions and file names count too", asked.hybrid, (on) => change({ hybrid: on })));
  }
  if (features.exclude) {
    const text = el("input", { type: "text", maxlength: 200, placeholder: "such as: a person", "aria-label": "Leave out what shows" });
    const add = () => {
      const said = text.value.trim();
      if (said && !asked.exclude.includes(said)) change({ exclude: [...asked.exclude, said] });
    };
    text.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); add(); } });
    parts.push(
      el("label", {}, el("span", { text: "Leave out what shows" }), el("span", { class: "joined" }, text, el("button", { type: "button", text: "Add", onclick: add }))),
      asked.exclude.length > 0 && el("div", { class: "chips" }, asked.exclude.map((said) => chip(`not ${said}`, () => change({ exclude: asked.exclude.filter((other) => other !== said) })))),
    );
  }
  if (known.calibrated) {
    const said = el("output", { text: confidenceText(asked.minConfidence) });
    const slider = el("input", {
      type: "range", min: 0, max: 0.9, step: 0.05, value: asked.minConfidence,
      oninput: () => { said.textContent = confidenceText(Number(slider.value)); },
      onchange: () => change({ minConfidence: Number(slider.value) }),
    });
    parts.push(el("label", {}, el("span", {}, "Least confidence: ", said), slider), el("p", { class: "hint", text: "How probable it is that a photograph is the very one you describe. Known for sentences; where many would do, 10 % is much." }));
  }
  const reset = el("button", { type: "button", text: "Reset all", onclick: () => change({ where: {}, exclude: [], minConfidence: 0, hybrid: false }) });
  const done = el("button", { type: "button", class: "primary", text: "Done", onclick: () => panel.hidePopover() });
  panel.replaceChildren(el("h2", { text: "Filters" }), ...parts.filter(Boolean), el("div", { class: "actions" }, reset, done));
}

function confidenceText(value) {
  return value ? `${percent(value)}, “${sureness(value).toLowerCase()}” or surer` : "any";
}

/** A removable chip. */
export function chip(text, remove) {
  return el("span", { class: "chip" }, el("span", { text }), iconButton("close", `Remove: ${text}`, remove));
}

/** The filters in use as chips. */
export function filterChips(asked, change) {
  const { where } = asked;
  const without = (key) => () => {
    const left = { ...where };
    delete left[key];
    change({ where: left });
  };
  return [
    where.after && chip(`from ${dateOf(where.after)}`, without("after")),
    where.before && chip(`to ${dateOf(shifted(where.before, -1))}`, without("before")),
    where.camera && chip(where.camera, without("camera")),
    where.minSide && chip(`at least ${where.minSide} pixels`, without("minSide")),
    where.minSize && chip(`at least ${fileSize(where.minSize)}`, without("minSize")),
    where.folder && chip(`in ${where.folder}`, without("folder")),
    where.hasCaption && chip("with a caption", without("hasCaption")),
    asked.hybrid && chip("words count", () => change({ hybrid: false })),
    ...asked.exclude.map((text) => chip(`not ${text}`, () => change({ exclude: asked.exclude.filter((other) => other !== text) }))),
    asked.minConfidence > 0 && chip(`at least ${percent(asked.minConfidence)} sure`, () => change({ minConfidence: 0 })),
  ].filter(Boolean);
}

// Sheets -------------------------------------------------------------------------------------------------------------

/** Fill a sheet and open it; a click beside it closes it. */
function openSheet(dialog, title, ...parts) {
  dialog.replaceChildren(el("div", { class: "head" }, el("h2", { text: title }), iconButton("close", "Close (Esc)", () => dialog.close())), el("div", { class: "body" }, ...parts));
  dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); };
  if (!dialog.open) dialog.showModal();
}

/** A concept: what it was taught with, and how to rename or remove it. hooks: rename(new), remove(), use(). */
export function openConcept(dialog, concept, hooks) {
  const input = el("input", { type: "text", value: concept.name, maxlength: 100, required: true, "aria-label": "Name", spellcheck: "false" });
  const form = el("form", { class: "joined", onsubmit: (event) => { event.preventDefault(); hooks.rename(input.value.trim().replace(/^@/, "")); } }, el("span", { class: "at", text: "@" }), input, el("button", { class: "primary", text: "Rename" }));
  const remove = el("button", { type: "button", class: "danger", onclick: () => {
    if (remove.dataset.sure) hooks.remove();
    remove.dataset.sure = "yes";
    remove.lastChild.textContent = "Really remove it?";
  } }, icon("trash"), el("span", { text: "Remove" }));
  const taught = concept.examples === undefined ? "" : `Taught with ${plural(concept.examples, "example")}${concept.others ? ` and ${plural(concept.others, "counter-example")}` : ""}. `;
  openSheet(
    dialog,
    `@${concept.name}`,
    concept.cover ? el("img", { class: "cover", src: concept.cover, alt: "One of its examples" }) : "",
    el("p", { text: taught + precisionInFull(concept.precision) }),
    el("p", { text: `Write @${concept.name} in any search, such as “@${concept.name} on a beach”.` }),
    form,
    el("div", { class: "actions" }, remove, el("button", { type: "button", class: "primary", text: "Search for it", onclick: hooks.use })),
  );
}

function bars(title, pairs, onclick) {
  if (!pairs?.length) return "";
  const most = Math.max(...pairs.map(([, number]) => number));
  return el("section", {}, el("h3", { text: title }), el("ul", { class: "bars" }, pairs.map(([name, number]) => {
    const bar = el("i");
    bar.style.width = `${Math.max(100 * number / most, 1)}%`;
    const label = onclick ? el("button", { type: "button", class: "link", text: name, onclick: () => onclick(name) }) : el("span", { text: name });
    return el("li", {}, label, el("b", { "aria-hidden": "true" }, bar), el("span", { class: "figure", text: count(number) }));
  })));
}

/** The collection in figures. choose(where): shows the photographs of a year or a camera. */
export function openFigures(dialog, figures, status, choose) {
  const years = figures.years ?? [];
  const facts = [
    ["photographs", count(figures.photos ?? status.photos)],
    figures.bytes !== undefined && ["of files", fileSize(figures.bytes)],
    figures.captions !== undefined && ["with a caption", count(figures.captions)],
    years.length > 0 && ["taken", years.length > 1 ? `${years[0][0]} to ${years.at(-1)[0]}` : years[0][0]],
    figures.failed > 0 && ["files that can’t be used", count(figures.failed)],
  ].filter(Boolean);
  const close = (where) => { dialog.close(); choose(where); };
  openSheet(
    dialog,
    "The collection in figures",
    el("dl", { class: "facts" }, facts.map(([name, value]) => el("div", {}, el("dd", { text: value }), el("dt", { text: name })))),
    bars("Years", years, (year) => close({ after: `${year}-01-01`, before: `${Number(year) + 1}-01-01` })),
    bars("Cameras", figures.cameras, (camera) => close({ camera })),
    bars("Formats", figures.formats),
    el("p", { class: "hint", text: `Model: ${status.model}${status.calibrated ? "" : "; it is not calibrated, so it gives no confidences"}.` }),
    status.folders?.length ? el("p", { class: "hint", text: `Folders: ${status.folders.join(", ")}` }) : "",
  );
}

/** The keys. */
export function openHelp(dialog, features) {
  const keys = [
    ["/", "type a search"], ["← ↑ ↓ →", "move in the grid"], ["Enter", "open a photograph"], ["Esc", "close, or clear the search"],
    features.refine && ["t", "tick: more like this"], features.refine && ["x", "cross: less like this"], ["s", "similar photographs"],
    features.explain && ["e", "explain: where, and by which words"], ["i", "about the photograph, when it is open"], features.filters && ["f", "filters"], features.paint && ["p", "paint what a sentence says"], ["?", "this sheet"],
  ].filter(Boolean);
  openSheet(
    dialog,
    "Keys and hints",
    el("dl", { class: "keys" }, keys.map(([key, what]) => el("div", {}, el("dt", {}, el("kbd", { text: key })), el("dd", { text: what })))),
    el("ul", { class: "hints" }, [
      "Whole sentences work best: “two dogs racing through snow”.",
      features.image !== false && "Drop or paste a picture anywhere to search by it; words then say what should be different.",
      features.refine && "Tick what fits and cross what does not: the list follows at once.",
      features.concepts && "Save your ticks as @name, and write @name in any sentence from then on.",
      "The thin bar below a photograph says how sure the model is; rest the pointer on it for words.",
    ].filter(Boolean).map((text) => el("li", { text }))),
  );
}
