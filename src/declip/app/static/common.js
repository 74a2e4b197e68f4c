// Shared by all views: elements, requests, status, cards. Text from the data only becomes text nodes.

export const find = (id) => document.getElementById(id);

/** An element: attributes, then children; a string is a text node. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** The JSON at an address; throws an Error with a message for the user. */
export async function ask(address, options = {}) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is declip app still running?");
  }
  const tree = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(tree.error || `The server answered ${answer.status}.`);
  return tree;
}

export const sendJson = (address, tree) =>
  ask(address, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(tree) });

/** Writes to the view's status line: kind is "", "busy" or "bad". */
export function say(text, kind = "") {
  const line = find("said");
  line.textContent = text;
  line.className = `said ${kind}`;
}

/** Wraps the work of a form: the answer of an earlier call is ignored; `clear` removes a result and drops a running call. */
export function latest(work, hide) {
  let number = 0;
  const clear = () => {
    number++;
    hide();
  };
  const run = async () => {
    const mine = ++number;
    try {
      await work(() => mine === number);
    } catch (error) {
      if (mine !== number) return;
      hide();
      say(error.message, "bad");
    }
  };
  return { run, clear };
}

export const thumbnail = (id) => `/thumbnails/${id}?v=${document.body.dataset.version}`;

/** The thumbnail of an image of the index, or a text if there is none. */
function thumbnailOf(hit) {
  if (hit.id === null) return make("span", { class: "no-image" }, "not in this source");
  const image = make("img", { src: thumbnail(hit.id), alt: hit.captions[0] || hit.key, loading: "lazy", decoding: "async" });
  image.addEventListener("error", () => image.replaceWith(make("span", { class: "no-image" }, "the image can no longer be read")));
  return image;
}

/** An image with its caption and facts; it links to similar images. */
export function card(hit, { title, facts = [], row = false, more = [] } = {}) {
  const shown = title || hit.captions[0] || hit.key;
  const inner = thumbnailOf(hit);
  const linked = hit.id === null ? inner : make("a", { href: `/search?id=${hit.id}`, title: "Similar images" }, inner);
  const others = hit.captions.length > 1 ? hit.captions.join("\n") : shown;
  const lines = [make("p", { class: "words", title: others }, shown), ...facts.map((fact) => make("p", { class: "facts" }, fact)), ...more];
  return row ? make("li", { class: "card row" }, linked, make("div", {}, ...lines)) : make("li", { class: "card" }, linked, ...lines);
}

export const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/** The chosen template: the name of a set, the user's own, or empty. */
export function template() {
  const chosen = find("template").value;
  return chosen === "own" ? find("own").value : chosen;
}

export function watchTemplate() {
  find("template").addEventListener("change", () => {
    find("own-field").hidden = find("template").value !== "own";
  });
}
