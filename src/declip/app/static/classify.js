import { find, latest, make, say, sendJson, template, watchTemplate } from "./common.js";
import { watchPicker } from "./picker.js";

const percent = (value) => (value >= 0.0005 ? `${(100 * value).toFixed(1)} %` : "< 0.1 %");

const { run, clear } = latest(async (current) => {
  if (!chosen.token && chosen.id === null) return say("Choose an image first.", "bad");
  say("Classifying …", "busy");
  const classes = find("classes").value.split("\n");
  const found = await sendJson("/api/classify", { image: chosen.token, id: chosen.id, classes, template: template() });
  if (!current()) return;
  const shown = found.classes.slice(0, 100);
  find("bars").replaceChildren(...shown.map(bar));
  find("scale").textContent =
    `The softmax of ${found.scale.toFixed(1)} times the cosines` +
    (shown.length < found.classes.length ? `; the first ${shown.length} of ${found.classes.length} classes are shown.` : ".");
  find("result").hidden = false;
  say(`Most likely: ${shown[0].name}, ${percent(shown[0].probability)}`);
}, () => (find("result").hidden = true));

function bar(row) {
  const filled = make("div", { class: "bar" });
  filled.style.width = `${100 * row.probability}%`;
  const name = make("span", {}, row.name, make("small", {}, `cosine ${row.cosine.toFixed(3)}`));
  return make("li", {}, name, make("div", { class: "track", "aria-hidden": "true" }, filled), make("span", { class: "percent" }, percent(row.probability)));
}

const chosen = watchPicker((image) => (image.token ? run() : clear()), clear);
watchTemplate();
find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
const id = new URLSearchParams(location.search).get("id");
if (/^\d+$/.test(id || "")) {
  chosen.take(Number(id));
  run();
}
