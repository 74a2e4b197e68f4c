// The list of pairs to exclude: stays in this browser under the name of the index, saved as a file by the server.

import { count, find, make, say } from "./common.js";

const NAME = `declip-list-${document.body.dataset.list}`;
const marked = new Map(JSON.parse(localStorage.getItem(NAME) || "[]"));

/** Adds pairs to the list; a pair that is on it keeps its first reason. */
export function add(ids, reason) {
  for (const id of ids) if (!marked.has(id)) marked.set(id, reason);
  changed();
}

function remove(id) {
  marked.delete(id);
  changed();
}

/** A checkbox that adds a pair to the list or removes it. */
export function box(id, reason, label = "exclude") {
  const input = make("input", { type: "checkbox", "data-pair": id });
  input.checked = marked.has(id);
  input.addEventListener("change", () => (input.checked ? add([id], reason) : remove(id)));
  return make("label", { class: "take" }, input, label);
}

function changed() {
  try {
    localStorage.setItem(NAME, JSON.stringify([...marked]));
  } catch {
    // Too long for the browser's storage: the list is lost when the page is closed.
  }
  find("list-count").textContent = count(marked.size, "pair");
  find("save").disabled = find("clear").disabled = !marked.size;
  for (const input of document.querySelectorAll("[data-pair]")) input.checked = marked.has(Number(input.dataset.pair));
}

async function save() {
  const tree = {};
  for (const [id, reason] of marked) (tree[reason] ||= []).push(id);
  const answer = await fetch("/api/pairs/list", { method: "POST", body: JSON.stringify(tree) });
  if (!answer.ok) return say((await answer.json()).error, "bad");
  const address = URL.createObjectURL(await answer.blob());
  make("a", { href: address, download: "drop.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
  return say(`Saved: ${count(marked.size, "pair")} in drop.jsonl`);
}

export function watchList() {
  find("save").addEventListener("click", () => save().catch(() => say("The server does not answer.", "bad")));
  find("clear").addEventListener("click", () => {
    marked.clear();
    changed();
    say("The list is empty.");
  });
  changed();
}
