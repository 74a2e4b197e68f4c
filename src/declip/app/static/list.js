// The list of pairs to exclude: kept in this tab until it is closed, saved as CSV by the server.

import { count, find, make, say } from "./common.js";

const PLACE = `declip-list-${document.body.dataset.version}`;
const kept = new Map(JSON.parse(sessionStorage.getItem(PLACE) || "[]"));

/** Puts pairs on the list; one that is there keeps its first reason. */
export function put(ids, reason) {
  for (const id of ids) if (!kept.has(id)) kept.set(id, reason);
  changed();
}

function take(id) {
  kept.delete(id);
  changed();
}

/** A checkbox that puts a pair on the list or takes it off. */
export function box(id, reason, label = "exclude") {
  const input = make("input", { type: "checkbox", "data-pair": id });
  input.checked = kept.has(id);
  input.addEventListener("change", () => (input.checked ? put([id], reason) : take(id)));
  return make("label", { class: "take" }, input, label);
}

function changed() {
  try {
    sessionStorage.setItem(PLACE, JSON.stringify([...kept]));
  } catch {
    // Too long for the tab's store: the list lives until the page is left.
  }
  find("list-count").textContent = count(kept.size, "pair");
  find("save").disabled = find("clear").disabled = !kept.size;
  for (const input of document.querySelectorAll("[data-pair]")) input.checked = kept.has(Number(input.dataset.pair));
}

async function save() {
  const tree = {};
  for (const [id, reason] of kept) (tree[reason] ||= []).push(id);
  const answer = await fetch("/api/pairs/list", { method: "POST", body: JSON.stringify(tree) });
  if (!answer.ok) return say((await answer.json()).error, "bad");
  const address = URL.createObjectURL(await answer.blob());
  make("a", { href: address, download: "drop.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
  return say(`Saved: ${count(kept.size, "pair")} in drop.csv`);
}

export function watchList() {
  find("save").addEventListener("click", () => save().catch(() => say("The server does not answer.", "bad")));
  find("clear").addEventListener("click", () => {
    kept.clear();
    changed();
    say("The list is empty.");
  });
  changed();
}
