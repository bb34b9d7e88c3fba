// Draw again as soon as a slider or a vote changes. Without this script, the button does.
const form = document.getElementById("steer");
let isDrawing = false;
let isOutdated = false;

function addressOf(form) {
  const filled = [...new FormData(form)].filter(([, value]) => value !== "");
  return `${form.getAttribute("action")}?${new URLSearchParams(filled)}`;
}

// One request at a time: changes during a drawing are drawn together afterwards.
async function draw() {
  isOutdated = isDrawing;
  if (isDrawing) return;
  isDrawing = true;
  const shown = document.getElementById("steered");
  shown.setAttribute("aria-busy", "true");
  const address = addressOf(form);
  try {
    const answer = await fetch(address);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const drawn = page.getElementById("steered");
    if (!drawn) throw new Error(page.querySelector("main")?.textContent ?? answer.statusText);
    shown.replaceChildren(...drawn.children);
    history.replaceState(null, "", address);
  } catch (error) {
    const message = document.createElement("p");
    message.className = "warn";
    message.textContent = error.message;
    shown.replaceChildren(message);
  }
  isDrawing = false;
  if (isOutdated) return draw();
  shown.removeAttribute("aria-busy");
}

form.addEventListener("input", ({ target }) => {
  const shown = form.querySelector(`output[for="${target.id}"]`);
  if (shown) shown.value = Number(target.value).toPrecision(3) * 1;
});
document.addEventListener("change", ({ target }) => target.form === form && draw());
form.addEventListener("submit", (event) => {
  if (event.submitter?.formMethod === "post") return;
  event.preventDefault();
  draw();
});
