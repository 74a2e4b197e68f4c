import { ask, card, find, latest, say, watchExamples } from "./common.js";

const plain = (text) => text.toLowerCase().split(/\s+/).join(" ").trim();

const run = latest(async (current) => {
  const text = find("text").value.trim();
  if (!text) {
    find("hits").replaceChildren();
    return say("Type a caption first.", "bad");
  }
  const where = document.querySelector("[name=where]:checked");
  if (!where) return say("There is no queue and there are no vectors of captions to look among.", "bad");
  say("Looking …", "busy");
  const found = await ask(`/api/neighbors?${new URLSearchParams({ text, where: where.value })}`);
  if (!current()) return;
  find("hits").replaceChildren(...found.hits.map((hit) => entry(hit, text)));
  const place = found.where === "queue" ? "entries of the run’s queue, each pair once" : "captions of the index";
  say(found.hits.length ? `The nearest ${found.hits.length} ${place}` : "Nothing is there to look among.");
});

function entry(hit, text) {
  const same = plain(hit.text) === plain(text) ? ["the same text"] : [];
  return card(hit, { title: hit.text, facts: [`cosine ${hit.cosine.toFixed(3)}`, ...same, hit.key] });
}

watchExamples(find("text"), find("form"));
find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
for (const choice of document.querySelectorAll("[name=where]")) {
  choice.addEventListener("change", () => find("text").value.trim() && run());
}
