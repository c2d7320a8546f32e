// The search, by the words of a question; rare words count more. Without scripts the site has no search and is complete.
const root = document.currentScript.dataset.root + "/";
const COMMON = new Set("a an and are as at be by can do does for how in is it its no not of on or that the to what when which who why with".split(" "));
const form = document.querySelector("[role=search]"), input = form.querySelector("input"), list = form.querySelector("ol");
let loading;

function load() {
  return loading ??= new Promise(done => {
    const script = document.createElement("script");
    script.src = root + "search-index.js";
    script.onload = () => done(ENTRIES.map(([url, page, title, text, group]) =>
      ({ url, page, title, text, group, low: `${page} ${title} ${text}`.toLowerCase() })));
    document.head.append(script);
  });
}

function find(entries, question) {
  const asked = question.toLowerCase().match(/[\p{L}\p{N}_]+/gu) ?? [];
  const words = [...new Set(asked)].filter(word => !COMMON.has(word));
  const phrase = asked.join(" ");
  const hits = words.map(word => {
    const at = new RegExp(`(^|[^\\p{L}\\p{N}])${word.length > 4 ? word.replace(/(e?s|e?d|ing)$/, "") : word}`, "u");
    return entries.map(entry => at.test(entry.low) + .5 * at.test(entry.title.toLowerCase()));
  });
  const weights = hits.map(hit => 4 + Math.log(entries.length / (1 + hit.filter(Boolean).length)));
  const whole = weights.reduce((a, b) => a + b, 0);
  return entries.map((entry, i) => {
    const share = hits.reduce((sum, hit, w) => sum + hit[i] * weights[w], 0) / whole;
    const extra = entry.low.includes(phrase) * .3 + entry.title.toLowerCase().includes(phrase) * .3;
    return { entry, score: share + extra + (entry.group === "mpnet/") * .15 - Math.min(entry.text.length, 8000) / 40000, share };
  }).filter(found => found.share > .45).sort((a, b) => b.score - a.score).slice(0, 12)
    .map(({ entry }) => ({ ...entry, start: Math.max(0, ...[phrase, ...words].map(w => entry.text.toLowerCase().indexOf(w)).filter(n => n > 0).slice(0, 1)) }));
}

async function show() {
  const found = input.value.trim() ? find(await load(), input.value) : [];
  list.replaceChildren(...found.map(({ url, page, title, text, start }) => {
    const item = document.createElement("li"), link = document.createElement("a");
    const name = document.createElement("b"), excerpt = document.createElement("span");
    link.href = root + url;
    name.textContent = title && title !== page ? `${page} · ${title}` : page;
    excerpt.textContent = (start > 60 ? "… " : "") + text.slice(Math.max(0, start - 60), start + 140);
    link.append(name, excerpt);
    return item.append(link), item;
  }));
  if (input.value.trim() && !found.length) list.textContent = "Nothing found.";
  list.hidden = !input.value.trim();
}

form.hidden = false;
document.querySelector(".contents")?.toggleAttribute("open", innerWidth > 1100);
form.addEventListener("input", show);
form.addEventListener("submit", event => { event.preventDefault(); list.querySelector("a")?.click(); });
document.addEventListener("click", event => { if (!form.contains(event.target)) list.hidden = true; });
document.addEventListener("keydown", event => {
  if (event.key === "/" && document.activeElement !== input) { event.preventDefault(); input.focus(); }
  if (event.key === "Escape") { list.hidden = true; input.blur(); }
});
const asked = new URLSearchParams(location.search).get("q");
if (asked) { input.value = asked; show(); }
