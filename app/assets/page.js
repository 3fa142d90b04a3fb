// The little that the page does by itself. Listeners sit on the document, because Gradio makes
// and drops the elements of a tab as it likes.
(() => {
  const THEME = "dora-theme";
  const dark = matchMedia("(prefers-color-scheme: dark)");

  function wantsDark() {
    const chosen = localStorage.getItem(THEME);
    return chosen ? chosen === "dark" : dark.matches;
  }

  function applyTheme() {
    document.body.classList.toggle("dark", wantsDark());
    document.documentElement.style.colorScheme = wantsDark() ? "dark" : "light";
  }

  function toggleTheme() {
    localStorage.setItem(THEME, document.body.classList.contains("dark") ? "light" : "dark");
    applyTheme();
  }

  async function copy(button) {
    const text = button.parentElement.querySelector("pre").innerText;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Without a secure origin there is no clipboard; a selection can still be copied by hand.
      getSelection().selectAllChildren(button.parentElement.querySelector("pre"));
      return;
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }

  // The tab is in the address, so a reload comes back to it.
  const tabs = () => [...document.querySelectorAll('#tabs [role="tab"]')];

  function openTab(name) {
    const tab = tabs().find((t) => t.dataset.tabId === name);
    if (tab && tab.getAttribute("aria-selected") !== "true") tab.click();
    return tab;
  }

  // A click before Gradio listens is lost, so this is tried until it has worked.
  function openTabOfAddress() {
    const wanted = location.hash.slice(1);
    return !wanted || openTab(wanted)?.getAttribute("aria-selected") === "true";
  }

  function whenReady(check) {
    if (check()) return;
    const observer = new MutationObserver(() => check() && observer.disconnect());
    observer.observe(document.documentElement, { childList: true, subtree: true });
  }

  // Arrow keys move between tabs, as the pattern for them asks.
  function moveBetweenTabs(event) {
    const all = tabs().filter((t) => t.offsetParent);
    const at = all.indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    const next = all[(to + all.length) % all.length];
    next.click();
    next.focus();
  }

  // Gradio opens a list at every key, also at the one that leaves it, and then it stays open; one
  // that is long enough to scroll would be the next stop.
  function leaveList(event) {
    if (event.key !== "Tab" || !event.target.matches('[role="combobox"]')) return;
    event.stopPropagation();
    event.target.blur();
  }

  document.addEventListener("click", (event) => {
    if (event.target.closest("button.theme")) return toggleTheme();
    const button = event.target.closest("button.copy");
    if (button) return void copy(button);
    const tab = event.target.closest('#tabs [role="tab"]');
    if (tab) history.replaceState(null, "", `#${tab.dataset.tabId}`);
    const link = event.target.closest("[data-open-tab]");
    if (link) openTab(link.dataset.openTab);
  });
  document.addEventListener("keydown", moveBetweenTabs);
  document.addEventListener("keydown", leaveList, true);
  dark.addEventListener("change", applyTheme);
  // Gradio brings this script in when the page is there already.
  applyTheme();
  whenReady(openTabOfAddress);
  // It also sets its own class for the theme when it mounts.
  new MutationObserver(() => {
    if (document.body.classList.contains("dark") !== wantsDark()) applyTheme();
  }).observe(document.body, { attributes: true, attributeFilter: ["class"] });
})();
