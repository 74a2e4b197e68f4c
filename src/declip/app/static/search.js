import { ask, bar, card, count, find, make, percent, say, sendJson, thumbnail } from "./common.js";

const image = { vector: null, id: null }; // chosen: of a file, or of the index
let number = 0; // of the last question: answers to earlier ones are ignored
let uploads = 0;

const hasImage = () => image.vector !== null || image.id !== null;
const template = () => (find("template").value === "own" ? find("own").value : find("template").value);

function clear() {
  number++;
  find("hits").replaceChildren();
  find("note").textContent = "";
  find("classified").hidden = true;
}

async function run() {
  const text = find("text").value.trim();
  if (!text && !hasImage()) {
    clear();
    history.replaceState(null, "", location.pathname);
    return say("Enter a text, or choose an image.", "bad");
  }
  const mine = ++number;
  const asked = { text, ...image, template: template(), over: find("over").value, where: find("where")?.value.trim() || "", group: find("group")?.value || "", weight: Number(find("balance").value) };
  const classes = hasImage() ? find("classes").value.split("\n").filter((name) => name.trim()) : [];
  say("Searching …", "busy");
  try {
    const answer = await sendJson("/api/search", { ...asked, classes, count: Number(find("count").value) });
    if (mine === number) show(answer, asked);
  } catch (error) {
    if (mine !== number) return;
    clear();
    say(error.message, "bad");
  }
}

function facts(hit, group) {
  const lines = [`cosine ${hit.cosine.toFixed(3)}`];
  if (hit.captions.length) lines.push(hit.key);
  if (hit.copies) lines.push(`and ${group ? `${hit.copies} more of this ${group}` : count(hit.copies, "near copy", "near copies")}`);
  return lines;
}

/** A button that asks what a text and an image both resemble, and is replaced by the answer. */
function whyButton(text, id) {
  const button = make("button", { type: "button", class: "why", title: "Which known pairs or classes text and image both resemble" }, "Why?");
  button.addEventListener("click", async () => {
    const line = make("p", { class: "facts", role: "status" }, "Comparing …");
    button.replaceWith(line);
    try {
      const { resembles } = await sendJson("/api/why", { text, id });
      const names = resembles.map((name) => `“${name}”`).join(", ");
      line.textContent = names ? `Text and image resemble ${names}` : "Text and image resemble no known pair or class together.";
    } catch (error) {
      line.textContent = error.message;
    }
  });
  return button;
}

function show({ hits, images, seconds, classes, scale, note, explained }, { text, id, template, over, weight, where, group }) {
  const cards = hits.map((hit) => card(hit, { facts: facts(hit, group), more: explained ? [whyButton(text, hit.id)] : [] }));
  find("hits").replaceChildren(...cards);
  find("note").textContent = note;
  const nearest = hits.length ? `The nearest ${hits.length} of ${count(images, "image")}, in ${seconds.toFixed(2)} s` : "No results: no image has a caption, or this value.";
  find("classified").hidden = !classes;
  if (classes) {
    find("bars").replaceChildren(...classes.slice(0, 100).map((row) => bar(row.name, `cosine ${row.cosine.toFixed(3)}`, row.probability)));
    const part = classes.length > 100 ? `; the first 100 of ${classes.length} classes are shown.` : ".";
    find("scale").textContent = `Probabilities: the softmax of ${scale.toFixed(1)} times the cosines${part} They add up to 100 %, also if no class is right.`;
  }
  say(classes ? `Most likely: ${classes[0].name}, ${percent(classes[0].probability)}. ${nearest}` : nearest);
  // --- the address, unless the image is a file
  const parameters = { text, id, weight: text && id !== null ? weight : "", template: text ? template : "", over, where, group };
  const address = new URL(location);
  address.search = image.vector ? "" : new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== "" && value !== null));
  history.replaceState(null, "", address);
}

// --- the image to search with

function choose(source, chosen = {}) {
  Object.assign(image, { vector: null, id: null }, chosen);
  const preview = find("preview-image");
  URL.revokeObjectURL(preview.src);
  preview.removeAttribute("src");
  if (source) preview.src = source;
  find("preview").hidden = !source;
  balance();
}

/** Sends a file, whose vector later requests have. */
async function upload(file) {
  const mine = ++uploads;
  choose(null);
  clear();
  say("Reading the image …", "busy");
  try {
    const { vector } = await ask("/api/images", { method: "POST", body: file });
    if (mine !== uploads) return;
    choose(URL.createObjectURL(file), { vector });
    run();
  } catch (error) {
    if (mine === uploads) say(error.message, "bad");
    find("file").value = "";
  }
}

function forget() {
  uploads++;
  choose(null);
  find("file").value = "";
  find("file").focus();
  clear();
  say("Image removed.");
  history.replaceState(null, "", location.pathname);
  if (find("text").value.trim()) run();
}

function balance() {
  const text = Number(find("balance").value);
  find("balance-field").hidden = !(find("text").value.trim() && hasImage());
  find("balance-said").textContent = `${Math.round(100 * (1 - text))} : ${Math.round(100 * text)}`;
}

const drop = find("file").closest(".drop");
find("file").addEventListener("change", () => find("file").files.length && upload(find("file").files[0]));
find("forget").addEventListener("click", forget);
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (kind !== "dragleave") event.preventDefault();
    drop.classList.toggle("over", ["dragenter", "dragover"].includes(kind));
    if (kind !== "drop") return;
    if (event.dataTransfer.files.length) upload(event.dataTransfer.files[0]);
    else say("Not a file. Drop an image file.", "bad");
  });
}
document.addEventListener("paste", (event) => event.clipboardData.files.length && upload(event.clipboardData.files[0]));

// --- the form, as the address has it

const showOwn = () => (find("own-field").hidden = find("template").value !== "own");
find("template").addEventListener("change", showOwn);
for (const id of ["text", "balance"]) find(id).addEventListener("input", balance);
find("classes").addEventListener("input", () => (sessionStorage.classes = find("classes").value));
for (const button of document.querySelectorAll("[data-example]")) {
  button.addEventListener("click", () => {
    find("text").value = button.dataset.example;
    find("form").requestSubmit();
  });
}
find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
const given = new URLSearchParams(location.search);
const named = given.get("template") || "";
find("text").value = given.get("text") || "";
find("classes").value = sessionStorage.classes || "";
find("template").value = named.includes("{}") ? "own" : named;
if (named.includes("{}")) find("own").value = named;
showOwn();
for (const id of ["where", "group"]) if (find(id)) find(id).value = given.get(id) || "";
find("balance").value = given.get("weight") ?? 0.5;
if (given.get("over") === "captions" && find("over").options.length > 1) find("over").value = "captions";
if (/^\d+$/.test(given.get("id") || "")) {
  choose(thumbnail(given.get("id")), { id: Number(given.get("id")) });
  find("more").open = true;
}
balance();
if (named && !find("template").value) say(`There is no template set "${named}".`, "bad");
else if (find("text").value || hasImage()) run();
