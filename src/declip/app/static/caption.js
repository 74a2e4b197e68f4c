import { bar, count, find, make, percent, say, sendJson } from "./common.js";

// Of this tab: another one is offered other images.
const tab = Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(36)).join("");
const passed = []; // positions shown before, for "back"
let shown = null; // the image on the page
let edited = null; // the saved caption that the field replaces
let busy = false;

const get = (query) => sendJson("/api/caption/next", { tab, ...query });

async function show(query) {
  const answer = await get(query);
  const left = answer.id !== undefined;
  progress(answer);
  shown = left ? answer : null;
  find("image").hidden = !left;
  find("key").textContent = left ? answer.key : "";
  find("suggestions").replaceChildren(...(left ? answer.suggestions : []).map((text) => chip(text, () => take(text))));
  find("near").hidden = !left || !answer.suggestions.length;
  for (const part of document.querySelectorAll("[data-image]")) part.hidden = !left;
  edit(null);
  captions(left ? answer.saved : []);
  if (left) find("image").src = `/images/${answer.id}?large=1&v=${document.body.dataset.version}`;
  else end(answer);
}

/** Says what to do after the last image. */
function end({ done, total }) {
  const others = total - done;
  if (others) say(`${count(others, "image")} of ${total} ${others === 1 ? "has" : "have"} no caption yet, and ${others === 1 ? "is" : "are"} shown in another tab.`);
  else say(`All ${count(total, "image")} have captions.`);
  find("next").hidden = false;
}

function chip(text, work) {
  const button = make("button", { type: "button", class: "chip" }, text);
  button.addEventListener("click", work);
  return make("li", {}, button);
}

function captions(saved) {
  if (shown) shown.saved = saved;
  if (!saved.includes(edited)) edited = null;
  find("saved").replaceChildren(...saved.map((text) => {
    const item = chip(text, () => edit(text));
    const cross = make("button", { type: "button", class: "chip", "aria-label": `Delete: ${text}`, title: "Delete this caption" }, "×");
    item.firstChild.setAttribute("aria-pressed", text === edited);
    item.firstChild.title = "Change this caption";
    item.firstChild.addEventListener("keydown", (event) => event.key === "Delete" && drop(text));
    cross.addEventListener("click", () => drop(text));
    item.append(cross);
    return item;
  }));
}

/** Puts a saved caption into the field, which then replaces it; null: the field adds a caption. */
function edit(text) {
  edited = text;
  take(text ?? "");
  for (const button of find("saved").querySelectorAll("[aria-pressed]")) button.setAttribute("aria-pressed", button.textContent === text);
}

function progress({ done, total, estimates, commands }) {
  say(`${done} of ${total} images have captions.`);
  find("estimates-part").hidden = !estimates.length;
  find("estimates").replaceChildren(...estimates.map((one) => {
    const range = [one.low, one.high].map((end) => `${(100 * end).toFixed(0)} %`).join(" to ");
    const hint = `before ${percent(one.start, 0)}; after ${range}`;
    return bar(`${count(one.captions, "caption")} of ${count(one.images, "image")}`, hint, one.value, 0, one.start);
  }));
  find("next").hidden = !estimates.length;
  for (const [number, command] of commands.entries()) find(`command-${number}`).textContent = command;
}

function take(text) {
  find("text").value = text;
  find("text").focus();
}

/** One request at a time: a key that is held down saves once. */
async function alone(work) {
  if (busy) return;
  busy = true;
  await work().catch((error) => say(error.message, "bad"));
  busy = false;
}

/** Sends captions of the image, in place of a saved one if there is an old one. */
async function send(added, old) {
  const replaces = old === null ? null : shown.saved.indexOf(old);
  try {
    const answer = await sendJson("/api/caption", { id: shown.id, captions: added, seen: shown.saved, replaces });
    progress(answer);
    captions(answer.saved);
  } catch (error) {
    // Another tab was faster: its captions are shown, and the typed one stays.
    const answer = await get({ position: shown.position }).catch(() => null);
    if (answer) captions(answer.saved);
    throw error;
  }
}

/** Saves the text in the field; false if there was none. */
async function save() {
  const text = find("text").value.trim();
  if (shown && text) {
    await send([text], edited);
    edit(null);
    return true;
  }
  if (shown && edited !== null) await remove(edited);
  else say(shown ? "Enter a caption, or skip the image." : "There is no image left.", "bad");
  return false;
}

async function remove(text) {
  const typed = edited === text ? "" : find("text").value;
  await send([], text);
  take(typed);
  say(`Deleted: ${text}`);
}

async function pass() {
  if (!shown) return;
  passed.push(shown.position);
  await show({ after: shown.position });
}

const next = () => alone(async () => (await save()) && pass());
const another = () => alone(save);
const drop = (text) => alone(() => remove(text));
const skip = () => alone(pass);
const back = () => alone(async () => {
  const position = passed.length ? passed.pop() : (shown ? shown.position : 0) - 1;
  if (position < 0) say("This is the first image.");
  else await show({ position });
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
  const suggestion = find("text").value ? undefined : shown?.suggestions["12345".indexOf(event.key)];
  if (suggestion) keys[event.key] = () => take(suggestion);
  if (!keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});

// --- another tab is not offered the image while this one is open

const hold = (id) => JSON.stringify({ tab, id });
setInterval(() => shown && fetch("/api/caption/hold", { method: "POST", body: hold(shown.id) }).catch(() => {}), 20_000);
addEventListener("pagehide", () => navigator.sendBeacon("/api/caption/hold", hold(null)));
addEventListener("pageshow", (event) => event.persisted && alone(() => show(shown ? { position: shown.position } : {})));
alone(() => show({}));
