import { ask, find, make, say, sendJson } from "./common.js";

// Of this tab: another one is offered other images.
const tab = Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(36)).join("");
let shown = null; // the image on the page
let edited = null; // the saved caption that the field replaces
let busy = false;
const passed = []; // places shown before, for "back"

async function show(query) {
  const found = await ask(`/api/caption?${new URLSearchParams({ tab, ...query })}`);
  progress(found);
  if (found.id === undefined) {
    shown = edited = null;
    find("image").hidden = true;
    find("key").textContent = "";
    find("saved").replaceChildren();
    find("suggestions").replaceChildren();
    return say(`All ${found.total} images have captions, or are shown in another tab.`);
  }
  shown = found;
  find("image").src = `/images/${found.id}?v=${document.body.dataset.version}`;
  find("image").hidden = false;
  find("key").textContent = found.key;
  edit(null);
  captions(found.saved);
  find("suggestions").replaceChildren(...found.suggestions.map((text) => {
    const button = make("button", { type: "button", class: "chip" }, text);
    button.addEventListener("click", () => take(text));
    return make("li", {}, button);
  }));
  find("text").focus();
}

function captions(saved) {
  shown.saved = saved;
  if (!saved.includes(edited)) edited = null;
  find("saved").replaceChildren(...saved.map((text) => {
    const change = make("button", { type: "button", class: "chip", "aria-pressed": String(text === edited), title: "Change this caption" }, text);
    const cross = make("button", { type: "button", class: "chip", "aria-label": `Delete: ${text}`, title: "Delete this caption" }, "×");
    change.addEventListener("click", () => edit(text));
    change.addEventListener("keydown", (event) => event.key === "Delete" && drop(text));
    cross.addEventListener("click", () => drop(text));
    return make("li", {}, change, cross);
  }));
}

/** Puts a saved caption into the field, which then replaces it; null: the field adds a caption. */
function edit(text) {
  edited = text;
  take(text ?? "");
  for (const button of find("saved").querySelectorAll("[aria-pressed]")) button.setAttribute("aria-pressed", button.textContent === text);
}

function progress(found) {
  say(`${found.done} of ${found.total} images have captions.`);
  find("estimates").replaceChildren(...found.estimates.map((one) => {
    const bar = make("div", { class: "bar" });
    bar.style.width = `${100 * one.value}%`;
    const range = [one.low, one.high].map((end) => `${(100 * end).toFixed(0)} %`).join(" to ");
    const words = make("span", {}, `${one.captions} images`, make("small", {}, range));
    return make("li", {}, words, make("div", { class: "track" }, bar), make("span", { class: "percent" }, `${(100 * one.value).toFixed(0)} %`));
  }));
}

function take(text) {
  find("text").value = text;
  find("text").focus();
}

/** One request at a time: a key that is held down saves once. */
async function alone(work) {
  if (busy) return;
  busy = true;
  try {
    await work();
  } catch (error) {
    say(error.message, "bad");
  }
  busy = false;
}

/** Sends captions of the image, in place of a saved one if there is an old one. */
async function send(captionsOfImage, old) {
  const replaces = old === null ? null : shown.saved.indexOf(old);
  try {
    const found = await sendJson("/api/caption", { id: shown.id, captions: captionsOfImage, seen: shown.saved, replaces });
    progress(found);
    captions(found.saved);
  } catch (error) {
    // Another tab was faster: its captions are shown, and the typed one stays.
    const place = await ask(`/api/caption?${new URLSearchParams({ tab, place: shown.place })}`).catch(() => null);
    if (place) captions(place.saved);
    throw error;
  }
}

async function save() {
  const text = find("text").value.trim();
  if (shown && edited !== null && !text) {
    await remove(edited);
    return false;
  }
  if (!text || !shown) {
    say(shown ? "Enter a caption, or skip the image." : "There is no image left.", "bad");
    return false;
  }
  await send([text], edited);
  edit(null);
  return true;
}

async function remove(text) {
  const typed = edited === text ? "" : find("text").value;
  await send([], text);
  take(typed);
  say(`Deleted: ${text}`);
}

const next = () => alone(async () => {
  if (!(await save())) return;
  passed.push(shown.place);
  await show({ after: shown.place });
});
const another = () => alone(save);
const drop = (text) => alone(() => remove(text));
const skip = () => alone(async () => {
  if (!shown) return;
  passed.push(shown.place);
  await show({ after: shown.place });
});
const back = () => alone(async () => {
  const place = passed.length ? passed.pop() : (shown ? shown.place : 0) - 1;
  if (place < 0) return say("This is the first image.");
  await show({ place });
});

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  next();
});
for (const [id, work] of Object.entries({ add: another, back, skip })) find(id).addEventListener("click", work);
document.addEventListener("keydown", (event) => {
  const keys = { PageUp: back, PageDown: skip };
  if (edited !== null) keys.Escape = () => edit(null);
  if (event.key === "Enter" && event.ctrlKey) keys.Enter = another;
  const number = Number(event.key);
  if (number >= 1 && number <= 5 && !find("text").value && shown?.suggestions[number - 1]) {
    keys[event.key] = () => take(shown.suggestions[number - 1]);
  }
  if (!keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});
alone(() => show({}));
