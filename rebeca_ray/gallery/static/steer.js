// Draw again as soon as a slider or a vote changes. Without this script, the button does.
const form = document.getElementById("steer");
let running = null;

function addressOf(form) {
  const filled = [...new FormData(form)].filter(([, value]) => value !== "");
  return `${form.getAttribute("action")}?${new URLSearchParams(filled)}`;
}

async function draw() {
  running?.abort();
  const request = (running = new AbortController());
  const before = document.getElementById("steered");
  before.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(addressOf(form), { signal: request.signal });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const after = page.getElementById("steered");
    if (!after) throw new Error(page.querySelector("main")?.textContent ?? answer.statusText);
    before.replaceChildren(...after.children);
    history.replaceState(null, "", addressOf(form));
  } catch (error) {
    if (error.name === "AbortError") return; // a later change draws
    const message = document.createElement("p");
    message.className = "warn";
    message.textContent = error.message;
    before.replaceChildren(message);
  }
  before.removeAttribute("aria-busy");
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
