// The page: what is asked, what is shown. It knows the backend by its interface alone, see server.js.

import { emptyQuestion, filterCount, fromAddress, isSearch, isSentence, toAddress } from "./address.js";
import { backend } from "./backend.js";
import { byId, el, fillIcons, iconButton, isPicture, isTyping, toast } from "./dom.js";
import { Grid, skeleton } from "./grid.js";
import { icon } from "./icons.js";
import { Easel } from "./paint.js";
import { chip, filterChips, fillFilters, openConcept, openFigures, openHelp } from "./panels.js";
import { count, monthOf, percent, plural, precisionInFull } from "./phrases.js";
import { Viewer } from "./viewer.js";

const SIZE = 60; // photographs that are asked for at once
const PAUSE = 180; // milliseconds without a key until a search begins
const STRIP = 24; // similar photographs below an open one
const NEAR = 20; // a photograph that is further down in a new list has lost the keyboard's attention

const { features } = backend;
const state = {
  asked: emptyQuestion(),
  status: { photos: null, calibrated: false, folders: [], model: "" },
  concepts: [],
  cameras: [],
  known: new Map(), // every photograph that was seen, by id
  pictures: new Map(), // files to search by, by the names that the address knows them under
  page: 0,
  more: false,
  loading: null, // AbortController of what is under way
  typing: false, // whether the address follows what is being typed
  opened: false, // whether the open photograph has an entry of its own in the history
};

const grid = new Grid(byId("photos"), { open: (at) => viewer.show(grid.photos[at], at), act: (name, at) => act(name, grid.photos[at]), near: loadMore, markOf, features });
const viewer = new Viewer(byId("viewer"), {
  photos: () => grid.photos,
  near: loadMore,
  act,
  markOf,
  explain: (photo, signal) => backend.explain({ id: photo.id, query: state.asked.query.trim() }, signal),
  similarTo: async (photo, signal) => remember((await backend.search({ like: photo.id, page: 1, size: STRIP }, signal)).matches),
  moved: (photo) => { openAddress(photo); grid.active = Math.max(viewer.at, 0); },
  closed: closeAddress,
  question: () => state.asked.query.trim(),
  features,
});
const easel = new Easel(byId("easel"), { paint: backend.paint, remember, open: (photo) => viewer.show(photo, -1), searchBy });

// Asking -------------------------------------------------------------------------------------------------------------

/** Ask with other values. push: whether the back button leads to what was asked before. */
function commit(patch, { push = true } = {}) {
  state.asked = { ...state.asked, ...patch, photo: null };
  writeAddress(push);
  sync();
  return run();
}

function writeAddress(push) {
  const address = toAddress(state.asked);
  const url = address ? `#${address}` : location.pathname + location.search;
  history[push ? "pushState" : "replaceState"](null, "", location.protocol === "file:" && !address ? "#" : url);
}

/** The photographs for what is asked, from the first. */
async function run() {
  state.loading?.abort();
  const turn = (state.loading = new AbortController());
  state.page = 0;
  state.more = false;
  wait(true);
  try {
    const answer = await ask(1, turn.signal);
    if (turn.signal.aborted) return;
    state.page = 1;
    state.more = answer.more;
    show(answer);
  } catch (error) {
    if (error.name === "AbortError" || turn.signal.aborted) return;
    showState("The search has failed", error.message, [button("Try again", run)], "gone");
  } finally {
    if (state.loading === turn) {
      state.loading = null;
      wait(false);
      grid.draw(); // which asks for more if there is room
    }
  }
}

/** A page of what is asked. */
async function ask(page, signal) {
  const { asked } = state;
  if (asked.view === "duplicates") return groupsOf(await backend.duplicates(signal));
  const { query, like, liked, disliked, exclude, where, minConfidence, hybrid } = asked;
  const image = state.pictures.get(asked.image) ?? null;
  const answer = isSearch(asked)
    ? await backend.search({ query: query.trim(), image, like, liked, disliked, exclude, where, minConfidence: isSentence(asked) ? minConfidence : 0, hybrid, page, size: SIZE }, signal)
    : await backend.browse({ page, size: SIZE, where }, signal);
  remember(answer.matches);
  if (answer.best) remember([answer.best]);
  return answer;
}

function groupsOf(groups) {
  const headings = new Map();
  groups.forEach((group, at) => group.forEach((photo) => headings.set(photo.id, `Group ${at + 1}: ${plural(group.length, "photograph")} alike`)));
  return { matches: remember(groups.flat()), best: null, searched: groups.flat().length, vetoed: 0, more: false, headings, groups: groups.length };
}

function remember(photos) {
  for (const photo of photos) state.known.set(photo.id, photo);
  return photos;
}

async function loadMore() {
  if (!state.more || state.loading) return;
  const turn = (state.loading = new AbortController());
  byId("waiting").hidden = false;
  byId("waiting").replaceChildren(...skeleton().slice(0, 8));
  try {
    const answer = await ask(state.page + 1, turn.signal);
    if (turn.signal.aborted) return;
    state.page += 1;
    state.more = answer.more;
    const there = new Set(grid.photos.map((photo) => photo.id)); // the collection may have grown meanwhile
    state.loading = null;
    grid.extend(answer.matches.filter((photo) => !there.has(photo.id)));
  } catch (error) {
    if (error.name === "AbortError" || turn.signal.aborted) return;
    state.more = false;
    toast(error.message, { bad: true, label: "Try again", action: () => { state.more = true; loadMore(); } });
  } finally {
    if (state.loading === turn) state.loading = null;
    if (!state.loading) byId("waiting").hidden = true;
  }
}

// Showing ------------------------------------------------------------------------------------------------------------

/** While an answer is awaited: grey tiles, or the old ones paler. */
function wait(on) {
  const host = byId("photos");
  host.setAttribute("aria-busy", on);
  const bones = on && !grid.photos.length && byId("state").hidden;
  byId("waiting").hidden = !bones;
  if (bones) byId("waiting").replaceChildren(...skeleton());
}

function show(answer) {
  const { asked } = state;
  byId("state").hidden = true;
  const host = byId("photos");
  const had = host.contains(document.activeElement);
  const kept = had ? grid.photos[grid.active]?.id : null;
  const headingOf = answer.headings ? (photo) => answer.headings.get(photo.id) : isSearch(asked) ? undefined : monthHeading;
  if (scrollY > 0) scrollTo(0, 0);
  const at = answer.matches.findIndex((photo) => photo.id === kept);
  grid.show(answer.matches, headingOf, at >= 0 && at < NEAR ? at : 0);
  if (had && answer.matches.length) grid.focus();
  byId("summary").textContent = summaryOf(answer);
  syncExample();
  drawTicks();
  if (!answer.matches.length) showNothing(answer);
  if (asked.photo !== null && !viewer.isOpen) {
    const at = answer.matches.findIndex((photo) => photo.id === asked.photo);
    if (at >= 0) viewer.show(answer.matches[at], at);
  }
}

function monthHeading(photo) {
  const moment = photo.moment ?? photo.taken;
  return moment ? monthOf(moment) : "Without a date";
}

function summaryOf(answer) {
  const { asked } = state;
  if (answer.headings) return answer.groups ? `${plural(answer.groups, "group")} of near-duplicates, the largest picture of each first. Nothing is deleted here.` : "";
  if (!answer.matches.length) return "";
  if (!isSearch(asked)) return Object.keys(asked.where).length ? `${plural(answer.searched, "photograph")} pass the filters` : plural(answer.searched, "photograph");
  const ticks = asked.liked.length + asked.disliked.length;
  const how = ticks ? `Refined by ${plural(asked.liked.length, "tick")}${asked.disliked.length ? ` and ${plural(asked.disliked.length, "cross", "crosses")}` : ""}` : asked.like !== null || asked.image ? "Nearest first" : "Best first";
  const left = answer.vetoed ? ` · ${plural(answer.vetoed, "photograph")} left out for what they show` : "";
  return `${how}, of ${plural(answer.searched, "photograph")}${left}`;
}

const button = (text, onclick, attributes = {}) => el("button", { type: "button", text, onclick, class: "primary", ...attributes });

/** In place of photographs: what is the matter, and what can be done. */
function showState(title, sentence, parts = [], name = "picture") {
  grid.show([]);
  byId("summary").textContent = "";
  byId("state").replaceChildren(icon(name), el("h2", { text: title }), el("p", { text: sentence }), ...parts);
  byId("state").hidden = false;
  byId("state").setAttribute("role", name === "gone" ? "alert" : "status");
}

function showNothing(answer) {
  const { asked } = state;
  if (answer.headings) return showState("No near-duplicates", "No two photographs of the collection are nearly the same.", [], "stack");
  if (!answer.searched && filterCount({ ...asked, exclude: [], minConfidence: 0, hybrid: false })) {
    return showState("No photograph passes the filters", "Widen them, or take them away.", [button("Take the filters away", () => commit({ where: {} }))], "filter");
  }
  if (!answer.searched) return showEmpty();
  const { best } = answer;
  if (best && best.confidence !== null && asked.minConfidence > best.confidence) {
    const image = el("img", { src: best.thumb, alt: "" });
    const card = el("button", { type: "button", class: "best", "aria-label": `The closest: ${best.caption || best.name}`, onclick: () => viewer.show(best, -1) }, image, el("span", { text: best.caption || best.name }));
    const sentence = `The closest is this one, at ${percent(best.confidence)}; you have asked for at least ${percent(asked.minConfidence)}.`;
    return showState("Nothing seems to match", sentence, [card, button("Show what there is", () => commit({ minConfidence: 0 }))], "search");
  }
  return showState("Nothing is left", answer.vetoed ? "All that match show what is to be left out." : "Other words may find more.", answer.vetoed ? [button("Leave nothing out", () => commit({ exclude: [] }))] : [], "search");
}

function showEmpty() {
  const command = "clipmatch index ~/Pictures";
  const copy = navigator.clipboard ? iconButton("copy", "Copy the command", () => navigator.clipboard.writeText(command).then(() => toast("Copied."))) : null;
  showState("No photographs yet", "Index a folder in a terminal; this page follows by itself.", [el("p", { class: "command" }, el("code", { text: command }), copy)]);
  setTimeout(async () => {
    if (!(await refreshStatus()) || state.status.photos) run();
    else if (!byId("state").hidden) showEmpty();
  }, 2500);
}

/** Everything around the photographs, as the question is. */
function sync() {
  const { asked } = state;
  if (byId("query").value !== asked.query && !(state.typing && document.activeElement === byId("query"))) byId("query").value = asked.query;
  const search = isSearch(asked);
  document.title = asked.query.trim() ? `${asked.query.trim()} – clipmatch` : "clipmatch";
  byId("headline").textContent = asked.view === "duplicates" ? "Near-duplicates" : search ? "Matches" : "Photographs";
  byId("clear").hidden = !search;
  document.body.classList.toggle("searching", search);
  byId("duplicates").setAttribute("aria-pressed", asked.view === "duplicates");
  const used = filterCount(asked);
  const badge = byId("filter").querySelector(".badge");
  badge.hidden = !used;
  badge.textContent = used || "";
  const chips = filterChips(asked, commit);
  byId("chosen").hidden = !chips.length;
  byId("chosen").replaceChildren(...chips);
  if (byId("filters").matches(":popover-open")) fillFilterPanel();
  syncExample();
  drawConcepts();
  drawTicks();
  grid.markAll();
  viewer.mark();
}

/** The photograph or picture that is searched by, in the search box. */
function syncExample() {
  const { asked } = state;
  const place = byId("example");
  const file = state.pictures.get(asked.image);
  const photo = asked.like === null ? null : state.known.get(asked.like);
  place.hidden = !file && asked.like === null;
  byId("query").placeholder = place.hidden ? "What does the photograph show?" : "and what should be different?";
  const name = file ? file.name || "picture" : photo?.name ?? "a photograph";
  const key = `${asked.image}/${asked.like}/${name}`;
  if (place.hidden || place.dataset.key === key) return;
  place.dataset.key = key;
  const src = file ? URL.createObjectURL(file) : photo?.thumb;
  const made = chip(name, () => commit({ like: null, image: null }));
  if (src) made.prepend(el("img", { src, alt: "", onload: () => { if (file) URL.revokeObjectURL(src); }, onerror: (event) => event.target.remove() }));
  place.replaceChildren(made);
}

// Ticks and concepts -------------------------------------------------------------------------------------------------

function markOf(id) {
  return state.asked.liked.includes(id) ? "liked" : state.asked.disliked.includes(id) ? "disliked" : "";
}

/** What can be done with a photograph. */
function act(name, photo) {
  if (!photo) return;
  if (name === "explain") {
    viewer.show(photo, grid.photos.indexOf(photo));
    viewer.showWhy();
  } else if (name === "similar") {
    viewer.close();
    commit({ query: "", view: "", like: photo.id, image: null, liked: [], disliked: [] });
  } else if (features.refine) {
    mark(photo, name === "like" ? "liked" : "disliked");
  }
}

/** Tick or cross a photograph, or take that back. */
function mark(photo, kind) {
  const other = kind === "liked" ? "disliked" : "liked";
  const { asked } = state;
  const patch = {
    view: "",
    [kind]: asked[kind].includes(photo.id) ? asked[kind].filter((id) => id !== photo.id) : [...asked[kind], photo.id],
    [other]: asked[other].filter((id) => id !== photo.id),
  };
  if (viewer.isOpen) { // the list stays while one looks at its photographs; it follows when the viewer closes
    state.asked = { ...asked, ...patch };
    state.stale = true;
    writeAddress(false);
    sync();
  } else {
    commit(patch, { push: false });
  }
}

function drawTicks() {
  const { liked, disliked } = state.asked;
  const bar = byId("ticks");
  bar.hidden = !liked.length && !disliked.length;
  if (bar.hidden) return bar.replaceChildren();
  const shown = `${liked}/${disliked}/${[...liked, ...disliked].filter((id) => state.known.has(id)).length}`;
  if (bar.dataset.shown === shown && bar.childElementCount) return;
  bar.dataset.shown = shown;
  const small = (ids, kind) => ids.slice(-6).map((id) => state.known.get(id)).filter(Boolean).map((photo) =>
    el("button", { type: "button", class: `small ${kind}`, title: photo.name, "aria-label": `Take back: ${photo.name}`, onclick: () => mark(photo, kind) }, el("img", { src: photo.thumb, alt: "" }), icon(kind === "liked" ? "tick" : "close")));
  const said = [liked.length && `${count(liked.length)} ticked`, disliked.length && `${count(disliked.length)} crossed out`].filter(Boolean).join(", ");
  const name = el("input", { type: "text", maxlength: 100, required: true, placeholder: "name", "aria-label": "Name of the concept", spellcheck: "false", autocapitalize: "none", value: bar.querySelector("input")?.value ?? "" });
  const save = el("form", { class: "joined", onsubmit: (event) => { event.preventDefault(); teach(name.value); } }, el("span", { class: "at", text: "@" }), name, el("button", { class: "primary", text: "Save" }));
  bar.replaceChildren(
    el("div", { class: "smalls" }, small(liked, "liked"), small(disliked, "disliked")),
    el("span", { class: "said", text: said }),
    features.concepts && liked.length ? save : "",
    iconButton("close", "Forget all ticks", () => commit({ liked: [], disliked: [] })),
  );
}

async function teach(text) {
  const name = text.trim().replace(/^@/, "");
  if (!name) return;
  try {
    const made = await backend.teach({ name, liked: state.asked.liked, disliked: state.asked.disliked });
    await refreshConcepts();
    toast(`Saved as @${made.name ?? name}. ${precisionInFull(made.precision)}`);
    await commit({ query: `@${made.name ?? name}`, like: null, image: null, liked: [], disliked: [], view: "" });
  } catch (error) {
    toast(error.message, { bad: true });
  }
}

async function refreshConcepts() {
  if (!features.concepts) return;
  try {
    state.concepts = await backend.concepts();
    drawConcepts();
  } catch { /* the next question will tell what is wrong */ }
}

function drawConcepts() {
  const row = byId("concepts");
  row.hidden = !state.concepts.length;
  const words = new Set(state.asked.query.split(/\s+/));
  row.replaceChildren(...state.concepts.map((concept) => {
    const name = `@${concept.name}`;
    const use = el("button", { type: "button", class: "use", "aria-pressed": words.has(name), title: precisionInFull(concept.precision), onclick: () => toggleConcept(name) }, concept.cover ? el("img", { src: concept.cover, alt: "", onerror: (event) => event.target.remove() }) : "", el("span", { text: name }));
    return el("span", { class: "chip concept" }, use, iconButton("more", `Rename or remove ${name}`, () => editConcept(concept)));
  }));
}

function toggleConcept(name) {
  const words = state.asked.query.split(/\s+/).filter(Boolean);
  commit({ query: (words.includes(name) ? words.filter((word) => word !== name) : [name, ...words]).join(" "), view: "" });
}

function editConcept(concept) {
  const dialog = byId("concept");
  const change = async (work, query) => {
    try {
      await work();
      dialog.close();
      await refreshConcepts();
      if (query !== state.asked.query) await commit({ query });
    } catch (error) {
      toast(error.message, { bad: true });
    }
  };
  const replaced = (by) => state.asked.query.split(/\s+/).map((word) => (word === `@${concept.name}` ? by : word)).filter(Boolean).join(" ");
  openConcept(dialog, concept, {
    rename: (name) => change(() => backend.renameConcept(concept.name, name), replaced(`@${name}`)),
    remove: () => change(() => backend.forgetConcept(concept.name), replaced("")),
    use: () => { dialog.close(); commit({ query: `@${concept.name}`, view: "" }); },
  });
}

// The open photograph and the address ----------------------------------------------------------------------------------

function openAddress(photo) {
  const push = state.asked.photo === null;
  state.asked.photo = photo.id;
  if (push) state.opened = true;
  writeAddress(push);
}

function closeAddress(photo, at) {
  if (state.asked.photo !== null) {
    state.asked.photo = null;
    if (state.opened && !state.stale) {
      state.opened = false;
      state.silent = true; // the question stays the same
      history.back();
    } else {
      writeAddress(false);
    }
  }
  state.opened = false;
  if (state.stale) {
    state.stale = false;
    run();
  }
  if (grid.photos.length && at >= 0) grid.focus(Math.min(at, grid.photos.length - 1));
}

function followAddress() {
  if (state.silent) {
    state.silent = false;
    return;
  }
  const asked = fromAddress(location.hash);
  if (asked.image && !state.pictures.has(asked.image)) asked.image = null; // files do not outlive the page
  const same = toAddress({ ...asked, photo: null }) === toAddress({ ...state.asked, photo: null });
  state.asked = asked;
  state.typing = false;
  if (asked.photo === null) {
    state.opened = false;
    viewer.close();
  } else if (same) {
    const at = grid.photos.findIndex((photo) => photo.id === asked.photo);
    if (at >= 0) viewer.show(grid.photos[at], at);
  }
  sync();
  if (!same) run();
}

// Search box, pictures, keys -------------------------------------------------------------------------------------------

let pause = 0;

function typed(now = false) {
  clearTimeout(pause);
  const search = () => {
    const query = byId("query").value;
    if (query.trim() === state.asked.query.trim() && state.asked.view === "") return;
    const push = !state.typing;
    state.typing = true;
    commit({ query, view: "" }, { push });
  };
  if (now) search();
  else pause = setTimeout(search, PAUSE);
}

function searchBy(file) {
  if (!file || features.image === false) return;
  if (!isPicture(file)) return toast(`${file.name || "That"} is no picture.`, { bad: true });
  const name = `${state.pictures.size + 1}`;
  state.pictures.set(name, file);
  viewer.close();
  commit({ query: "", view: "", like: null, image: name, liked: [], disliked: [] });
}

function listenForPictures() {
  if (features.image === false) return;
  byId("pick").hidden = false;
  byId("pick").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => { searchBy(byId("file").files[0]); byId("file").value = ""; });
  const carries = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  addEventListener("dragenter", (event) => { if (carries(event)) byId("drop").hidden = false; });
  addEventListener("dragover", (event) => { if (carries(event)) event.preventDefault(); });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) byId("drop").hidden = true; });
  addEventListener("drop", (event) => {
    byId("drop").hidden = true;
    if (!carries(event)) return;
    event.preventDefault();
    searchBy([...event.dataTransfer.files].find(isPicture) ?? event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find(isPicture);
    if (file) {
      event.preventDefault();
      searchBy(file);
    }
  });
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (isTyping(event)) return;
  const photo = byId("photos").contains(document.activeElement) ? grid.photos[grid.active] : null;
  const onPhoto = { t: "like", x: "dislike", s: "similar", e: "explain" }[event.key];
  if (onPhoto && photo) act(onPhoto, photo);
  else if (event.key === "/") byId("query").select();
  else if (event.key === "?") openHelp(byId("help"), { ...features, paint: state.status.paints });
  else if (event.key === "p" && !byId("paint").hidden) byId("paint").click();
  else if (event.key === "f" && !byId("filter").hidden) byId("filter").click();
  else if (event.key === "Escape" && isSearch(state.asked) && !document.querySelector(":popover-open")) clear();
  else if (event.key.startsWith("Arrow") && document.activeElement === document.body && grid.photos.length) grid.focus();
  else return;
  event.preventDefault();
}

/** Back to all photographs; filters stay. */
function clear() {
  state.typing = false;
  commit({ ...emptyQuestion(), where: state.asked.where, exclude: state.asked.exclude, minConfidence: state.asked.minConfidence, hybrid: state.asked.hybrid });
}

function listenForKeys() {
  const input = byId("query");
  document.addEventListener("keydown", pressed);
  input.addEventListener("input", () => typed());
  input.addEventListener("blur", () => { state.typing = false; });
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" && grid.photos.length) {
      event.preventDefault();
      grid.focus();
    } else if (event.key === "Escape") {
      event.preventDefault();
      if (isSearch(state.asked) || input.value) {
        input.value = "";
        clear();
      } else {
        input.blur();
      }
    }
  });
  byId("search").addEventListener("submit", (event) => {
    event.preventDefault();
    typed(true);
    state.typing = false;
  });
  byId("clear").addEventListener("click", () => { byId("query").value = ""; clear(); byId("query").focus(); });
  byId("home").addEventListener("click", (event) => { event.preventDefault(); commit(emptyQuestion()); });
  byId("skip").addEventListener("click", () => grid.focus());
}

// Tools ----------------------------------------------------------------------------------------------------------------

function fillFilterPanel() {
  const focused = [...byId("filters").querySelectorAll("input, select, button")].indexOf(document.activeElement);
  fillFilters(byId("filters"), state.asked, features, { cameras: state.cameras, folders: state.status.folders ?? [], calibrated: state.status.calibrated }, (patch) => commit(patch));
  byId("filters").querySelectorAll("input, select, button")[focused]?.focus();
}

async function showFigures() {
  try {
    openFigures(byId("figures"), await backend.statistics(), state.status, (where) => commit({ ...emptyQuestion(), where }));
  } catch (error) {
    toast(error.message, { bad: true });
  }
}

const THEMES = { "": ["contrast", "Theme: as the system"], light: ["sun", "Theme: light"], dark: ["moon", "Theme: dark"] };

function showTheme() {
  const [name, label] = THEMES[document.documentElement.dataset.theme ?? ""];
  byId("theme").replaceChildren(icon(name));
  byId("theme").title = label;
  byId("theme").setAttribute("aria-label", label);
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const name = names[(names.indexOf(document.documentElement.dataset.theme ?? "") + 1) % names.length];
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  try {
    localStorage.setItem("clipmatch-theme", name);
  } catch { /* it lasts as long as the page then */ }
  showTheme();
}

function listenForTools() {
  byId("filter").hidden = !features.filters && !features.exclude;
  byId("duplicates").hidden = !features.duplicates;
  byId("statistics").hidden = !features.statistics;
  byId("filter").popoverTargetElement = byId("filters");
  byId("filters").addEventListener("toggle", (event) => {
    byId("filter").setAttribute("aria-expanded", event.newState === "open");
    const panel = byId("filters");
    if (event.newState === "open" && !panel.contains(document.activeElement)) panel.querySelector("input")?.focus();
  });
  // Before it opens: "toggle" comes when it has been seen, and perhaps typed into.
  byId("filters").addEventListener("beforetoggle", (event) => { if (event.newState === "open") fillFilterPanel(); });
  byId("duplicates").addEventListener("click", () => commit(state.asked.view === "duplicates" ? { view: "" } : { ...emptyQuestion(), view: "duplicates" }));
  byId("statistics").addEventListener("click", showFigures);
  byId("paint").addEventListener("click", () => easel.open(state.asked.query.trim()));
  byId("theme").addEventListener("click", nextTheme);
  byId("help-button").addEventListener("click", () => openHelp(byId("help"), { ...features, paint: state.status.paints }));
}

/** Ask how many photographs there are -> whether it was answered. */
async function refreshStatus() {
  try {
    state.status = await backend.status();
    byId("paint").hidden = !state.status.paints;
    return true;
  } catch {
    return false; // the question for photographs tells what is wrong
  }
}

/** When the page is looked at again: has the collection changed? */
async function lookAgain() {
  if (document.visibilityState !== "visible" || viewer.isOpen) return;
  const before = state.status.photos;
  if ((await refreshStatus()) && before !== null && state.status.photos !== before && !isSearch(state.asked) && scrollY < innerHeight) run();
}

function start() {
  fillIcons();
  showTheme();
  listenForKeys();
  listenForPictures();
  listenForTools();
  addEventListener("popstate", followAddress);
  document.addEventListener("visibilitychange", lookAgain);
  state.asked = fromAddress(location.hash);
  state.asked.image = null;
  sync();
  run();
  refreshStatus();
  refreshConcepts();
  if (features.statistics) backend.statistics().then((figures) => { state.cameras = figures.cameras ?? []; }, () => {});
}

start();
