// MathJax 2, from the site's own folder. Its menu and its explorer are off, since their files are not copied.
window.MathJax = {
  config: ["TeX-AMS-MML_HTMLorMML-full.js"],
  jax: ["input/TeX", "output/HTML-CSS"],
  "HTML-CSS": { availableFonts: [], preferredFont: null, webFont: "STIX-Web", imageFont: null },
  tex2jax: {
    inlineMath: [["\\(", "\\)"]],
    displayMath: [["\\[", "\\]"]],
    ignoreClass: ".*",
    processClass: "arithmatex",
  },
  showMathMenu: false,
  messageStyle: "none",
};
