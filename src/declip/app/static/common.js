// Shared by all views: elements, requests, status, cards. Text from the data only becomes text nodes.

export const find = (id) => document.getElementById(id);

/** An element: attributes, then children; a string is a text node. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The JSON at an address; throws an Error with a message for the user. */
export async function ask(address, options = {}) {
  const answer = await fetch(address, options).catch(() => {
    throw new Error("The server does not answer. Is declip app still running?");
  });
  const tree = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(tree.error || `The server answered ${answer.status}.`);
  return tree;
}

export const sendJson = (address, tree) => ask(address, { method: "POST", body: JSON.stringify(tree) });

/** Writes to the view's status line: kind is "", "busy" or "bad". */
export function say(text, kind = "") {
  find("said").textContent = text;
  find("said").className = `said ${kind}`;
  if (kind === "bad") find("said").scrollIntoView({ block: "nearest" });
}

export const thumbnail = (id) => `/images/${id}?v=${document.body.dataset.version}`;

/** An image with its caption and facts; it links to similar images. */
export function card(hit, { facts = [], row = false, more = [] } = {}) {
  const shown = hit.captions[0] || hit.key;
  const image = make("img", { src: thumbnail(hit.id), alt: shown, loading: "lazy", decoding: "async" });
  image.addEventListener("error", () => image.replaceWith(make("span", { class: "no-image" }, "the image can no longer be read")));
  const linked = make("a", { href: `/search?id=${hit.id}`, title: "Similar images" }, image);
  const title = hit.captions.length > 1 ? hit.captions.join("\n") : shown;
  const lines = [make("p", { class: "words", title }, shown), ...facts.map((fact) => make("p", { class: "facts" }, fact)), ...more];
  return row ? make("li", { class: "card row" }, linked, make("div", {}, ...lines)) : make("li", { class: "card" }, linked, ...lines);
}

export const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

export const percent = (value, digits = 1) => (value >= 0.0005 ? `${(100 * value).toFixed(digits)} %` : "< 0.1 %");

/** A row of a list of fractions, with a bar, and a mark at an earlier value. */
export function bar(name, hint, value, digits = 1, before = null) {
  const filled = make("div", { class: "bar" });
  filled.style.width = `${100 * value}%`;
  const track = make("div", { class: "track", "aria-hidden": "true" }, filled);
  if (before !== null) {
    const mark = make("div", { class: "mark" });
    mark.style.left = `${100 * before}%`;
    track.append(mark);
  }
  const words = make("span", {}, name, make("small", {}, hint));
  return make("li", {}, words, track, make("span", { class: "percent" }, percent(value, digits)));
}
