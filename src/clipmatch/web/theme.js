// The chosen theme, before anything is painted. A classic script: modules wait for the whole page.
(() => {
  try {
    const chosen = localStorage.getItem("clipmatch-theme");
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch { /* storage may be forbidden; the system's theme it is */ }
})();
