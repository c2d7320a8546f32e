// Clicks through the page and leaves what it showed in #result. Runs in the page, after its script.
const lines = [];
const note = (what) => lines.push(`${what}: ${$("said").textContent.trim()} [${$("step").textContent}]`);
const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const chips = (group) => [...document.querySelectorAll(`.${group}-name + .chips > .chip`)];
addEventListener("error", (event) => lines.push(`error: ${event.message}`));
note("start");
$("next").click(); note("next");
$("next").click(); note("no third");
press("ArrowLeft"); note("left");
press("ArrowRight"); note("right");
chips("content")[0].click(); note("content");
chips("sentence")[2].dispatchEvent(new MouseEvent("mouseover", { bubbles: true })); note("hover");
chips("query")[0].focus(); note("focus");
lines.push(`focused: ${document.activeElement.dataset.entry}`);
lines.push(`seen: ${[...document.querySelectorAll(".chip.seen bdi")].map((each) => each.textContent).join(" ")}`);
for (const mode of ["mlm", "plm"]) { document.querySelector(`[value=${mode}]`).click(); $("next").click(); note(mode); }
lines.push(`cells: ${document.querySelectorAll("#matrix tr.chosen td.seen").length}`);
$("below").value = "bucket"; $("below").dispatchEvent(new Event("change", { bubbles: true }));
lines.push(`buckets: ${chips("content").map((each) => each.querySelectorAll("small")[1].textContent.trim()).join("|")}`);
if (!$("answers").hidden) {
  $("below").value = "attention"; $("below").dispatchEvent(new Event("change", { bubbles: true }));
  $("head").value = "1"; $("head").dispatchEvent(new Event("change", { bubbles: true }));
  lines.push(`attention: ${chips("content").map((each) => each.querySelectorAll("small")[1].textContent.trim()).join("|")}`);
  lines.push(`guesses: ${[...$("guesses").children].map((each) => each.firstChild.textContent).join("|")}`);
}
document.body.replaceChildren(Object.assign(document.createElement("pre"), { id: "result", textContent: lines.join("\n") }));
