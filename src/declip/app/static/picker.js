// Choose an image: a file, dropped or pasted. It is sent once; later requests send its token.

import { ask, find, say, thumbnail } from "./common.js";

/** Watches the picker; `changed` is called when an image is chosen or removed, `clear` when one is being sent. */
export function watchPicker(changed, clear) {
  const file = find("file");
  const drop = file.closest(".drop");
  const chosen = { token: null, id: null };
  let address = null;
  let number = 0;

  function show(source) {
    if (address) URL.revokeObjectURL(address);
    address = source && source.startsWith("blob:") ? source : null;
    find("preview").hidden = !source;
    if (source) find("preview-image").src = source;
    else find("preview-image").removeAttribute("src");
  }

  async function take(blob) {
    const mine = ++number;
    chosen.token = chosen.id = null;
    show(null);
    clear();
    say("Reading the image …", "busy");
    try {
      const { image } = await ask("/api/images", { method: "POST", body: blob, headers: { "Content-Type": "application/octet-stream" } });
      if (mine !== number) return;
      chosen.token = image;
      show(URL.createObjectURL(blob));
      say("The image is ready.");
      changed(chosen);
    } catch (error) {
      if (mine === number) say(error.message, "bad");
      file.value = "";
    }
  }

  file.addEventListener("change", () => file.files.length && take(file.files[0]));
  for (const kind of ["dragenter", "dragover"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  document.addEventListener("dragleave", () => drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
    else say("Not a file. Drop an image file.", "bad");
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) take(event.clipboardData.files[0]);
  });
  find("forget").addEventListener("click", () => {
    number++;
    chosen.token = chosen.id = null;
    file.value = "";
    show(null);
    file.focus();
    say("Image removed.");
    changed(chosen);
  });

  /** Takes an image of the index instead of a file. */
  chosen.take = (id) => {
    chosen.id = id;
    show(thumbnail(id));
  };
  return chosen;
}
