import { ask, card, count, find, latest, make, say, template, watchTemplate } from "./common.js";
import { watchPicker } from "./picker.js";

const { run, clear } = latest(async (current) => {
  const text = find("text").value.trim();
  const asked = new URLSearchParams({ count: find("count").value, over: find("over").value });
  if (text) asked.set("text", text);
  if (text && template()) asked.set("template", template());
  if (chosen.token) asked.set("image", chosen.token);
  else if (chosen.id !== null) asked.set("id", chosen.id);
  const image = chosen.token || chosen.id !== null;
  if (text && image) asked.set("weight", find("balance").value);
  if (!text && !image) {
    clear();
    history.replaceState(null, "", location.pathname);
    return say("Enter a text, or choose an image.", "bad");
  }
  say("Searching …", "busy");
  const found = await ask(`/api/search?${asked}`);
  if (!current()) return;
  find("hits").replaceChildren(...found.hits.map(hit));
  const pointing = text && matchMedia("(hover: hover)").matches ? ". Point at an image to see where the text fits." : "";
  if (text) for (const [place, card] of [...find("hits").children].entries()) showMap(card, found.hits[place].id, text);
  say(found.hits.length ? `The nearest ${found.hits.length} of ${count(found.images, "image")}, in ${found.seconds.toFixed(2)} s${pointing}` : "No results: no image has a caption.");
  const address = new URL(location);
  address.search = chosen.token ? "" : new URLSearchParams([...asked].filter(([name]) => name !== "count"));
  history.replaceState(null, "", address);
}, () => find("hits").replaceChildren());

function hit(row) {
  const actions = make("p", { class: "facts" }, make("a", { href: `/classify?id=${row.id}` }, "classify it"));
  return card(row, { facts: [`cosine ${row.cosine.toFixed(3)}`, row.key], more: [actions] });
}

/** While the pointer or the focus is on a card, shows the heat map of the text over its image. */
function showMap(card, id, text) {
  const image = card.querySelector("img");
  if (!image) return;
  const plain = image.src;
  let shown = false;
  const show = () => {
    shown = true;
    const map = new Image();
    map.addEventListener("load", () => {
      if (shown) image.src = map.src;
    });
    map.src = `/maps/${id}?${new URLSearchParams({ text })}`;
  };
  const hide = () => {
    shown = false;
    image.src = plain;
  };
  for (const event of ["pointerenter", "focusin"]) card.addEventListener(event, show);
  for (const event of ["pointerleave", "focusout"]) card.addEventListener(event, hide);
}

function balance() {
  const text = Number(find("balance").value);
  find("balance-field").hidden = !(find("text").value.trim() && (chosen.token || chosen.id !== null));
  find("balance-said").textContent = `${Math.round(100 * (1 - text))} : ${Math.round(100 * text)}`;
}

const chosen = watchPicker((image) => {
  balance();
  if (image.token || find("text").value.trim()) run();
  else {
    clear();
    history.replaceState(null, "", location.pathname);
  }
}, clear);
watchTemplate();
for (const button of document.querySelectorAll("[data-example]")) {
  button.addEventListener("click", () => {
    find("text").value = button.dataset.example;
    find("form").requestSubmit();
  });
}
find("text").addEventListener("input", balance);
find("balance").addEventListener("input", balance);
find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
const given = new URLSearchParams(location.search);
find("text").value = given.get("text") || "";
const words = given.get("template") || "";
const own = words.includes("{}");
find("template").value = own ? "own" : words;
if (own) find("own").value = words;
find("own-field").hidden = !own;
find("balance").value = given.get("weight") ?? 0.5;
if (given.get("over") === "captions" && find("over").options.length > 1) find("over").value = "captions";
if (/^\d+$/.test(given.get("id") || "")) {
  chosen.take(Number(given.get("id")));
  find("more").open = true;
}
balance();
if (words && !find("template").value) say(`There is no template set "${words}".`, "bad");
else if (find("text").value || chosen.id !== null) run();
