// The browser of drafts. Without this script every chain stands on the page and opens by itself.
"use strict";
(() => {
  const browser = document.getElementById("browser");
  if (!browser) return;
  const PER_PAGE = 12;
  const chains = [...browser.querySelectorAll("details.chain")];
  const form = browser.querySelector("form");
  const told = browser.querySelector("output");
  const [back, on] = browser.querySelectorAll(".pager button");
  let found = chains, start = 0;

  const matches = (chain, wanted, words) =>
    Object.entries(wanted).every(([name, value]) => !value || chain.dataset[name] === value) &&
    (!words || chain.textContent.toLowerCase().includes(words));

  function show() {
    const shown = new Set(found.slice(start, start + PER_PAGE));
    for (const chain of chains) chain.hidden = !shown.has(chain);
    const end = Math.min(start + PER_PAGE, found.length);
    told.textContent = found.length ? `${start + 1} to ${end} of ${found.length} chains` : "No chain is like this.";
    back.disabled = start === 0;
    on.disabled = end === found.length;
  }

  function filter() {
    const { words, ...wanted } = Object.fromEntries(new FormData(form));
    found = chains.filter((chain) => matches(chain, wanted, words.trim().toLowerCase()));
    start = 0;
    show();
  }

  function turn(pages) {
    start = Math.max(0, Math.min(start + pages * PER_PAGE, PER_PAGE * Math.ceil(found.length / PER_PAGE - 1)));
    show();
  }

  function open(place) {
    const chain = found[place];
    if (!chain) return;
    for (const other of found) other.open = other === chain;
    start = place - (place % PER_PAGE);
    show();
    chain.querySelector("summary").focus({ preventScroll: true });
    chain.scrollIntoView({ block: "nearest" });
  }

  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  back.addEventListener("click", () => turn(-1));
  on.addEventListener("click", () => turn(1));
  document.addEventListener("keydown", (event) => {
    const step = { j: 1, k: -1 }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("select, [type=search]")) return;
    const now = found.findIndex((chain) => chain.open && !chain.hidden);
    open(now < 0 ? start : now + step);
  });

  browser.classList.add("live");
  filter();
})();
