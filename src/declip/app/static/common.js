// What all views share: elements, requests, states, cards. Text from the data only ever becomes text nodes.

export const find = (id) => document.getElementById(id);

/** An element: attributes, then children; a string is a text node. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** The JSON at an address; throws an Error with a sentence for the user. */
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

/** Says what goes on, in the view's status line: kind is "", "busy" or "bad". */
export function say(text, kind = "") {
  const line = find("said");
  line.textContent = text;
  line.className = `said ${kind}`;
}

/** Runs what a form asks for, one at a time: a later call makes an earlier one's answer void. */
export function latest(work) {
  let number = 0;
  return async (...given) => {
    const mine = ++number;
    try {
      await work(() => mine === number, ...given);
    } catch (error) {
      if (mine === number) say(error.message, "bad");
    }
  };
}

export const thumbnail = (id, size = "small") => `/thumbnails/${id}?size=${size}&v=${document.body.dataset.version}`;

/** The picture of an image of the index, or a word where there is none. */
export function picture(hit, size = "small") {
  if (hit.id === null || hit.id === undefined) return make("span", { class: "no-picture" }, "not in this source");
  const image = make("img", { src: thumbnail(hit.id, size), alt: hit.captions[0] || hit.key, loading: "lazy", decoding: "async" });
  image.addEventListener("error", () => image.replaceWith(make("span", { class: "no-picture" }, "picture cannot be read any more")));
  return image;
}

/** A picture with its words and facts; it leads to the images like it. */
export function card(hit, { words, facts = [], row = false, more = [] } = {}) {
  const shown = words || hit.captions[0] || hit.key;
  const inner = picture(hit);
  const linked = hit.id === null || hit.id === undefined ? inner : make("a", { href: `/search?id=${hit.id}`, title: "Images like this one" }, inner);
  const others = hit.captions.length > 1 ? hit.captions.join("\n") : shown;
  const told = [make("p", { class: "words", title: others }, shown), ...facts.map((fact) => make("p", { class: "facts" }, fact)), ...more];
  return row ? make("li", { class: "card row" }, linked, make("div", {}, ...told)) : make("li", { class: "card" }, linked, ...told);
}

export const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/** How far a cosine lies from the usual one, in words. */
export const apart = (deviations) => `${Math.abs(deviations).toFixed(1)} deviations ${deviations < 0 ? "below" : "above"} the usual`;

/** The template that is chosen: a set's name, one's own, or nothing. */
export function template() {
  const chosen = find("template").value;
  return chosen === "own" ? find("own").value : chosen;
}

export function watchTemplate() {
  find("template").addEventListener("change", () => {
    find("own-field").hidden = find("template").value !== "own";
  });
}

/** Buttons with captions fill in a field and send its form. */
export function watchExamples(field, form) {
  for (const button of document.querySelectorAll("[data-example]")) {
    button.addEventListener("click", () => {
      field.value = button.dataset.example;
      form.requestSubmit();
    });
  }
}
