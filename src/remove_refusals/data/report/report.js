"use strict";
(() => {
  const byId = (id) => document.getElementById(id);

  function stepThroughLayers() {
    const slider = byId("picture-layer");
    if (!slider) return;
    const layers = JSON.parse(byId("picture-data").textContent);
    const sides = ["harmful", "harmless"];
    const circles = Object.fromEntries(
      sides.map((side) => [side, [...byId(`picture-${side}`).querySelectorAll("circle")]])
    );
    const zero = byId("picture-zero");
    const show = () => {
      const picture = layers[slider.value];
      byId("picture-said").textContent = picture.layer;
      byId("picture-auroc").textContent = picture.said;
      slider.setAttribute("aria-valuetext", `layer ${picture.layer}, ${picture.said}`);
      zero.setAttribute("x1", `${picture.zero}%`);
      zero.setAttribute("x2", `${picture.zero}%`);
      for (const side of sides) {
        picture[side].forEach(([x, y], index) => {
          circles[side][index].setAttribute("cx", `${x}%`);
          circles[side][index].setAttribute("cy", `${y}%`);
        });
      }
    };
    slider.hidden = false;
    slider.addEventListener("input", show);
    show();
    byId("picture").addEventListener("click", (event) => {
      const circle = event.target.closest("circle");
      if (!circle) return;
      byId("picture").querySelectorAll(".chosen").forEach((other) => other.classList.remove("chosen"));
      circle.classList.add("chosen");
      const side = circles.harmful.includes(circle) ? "harmful" : "harmless";
      byId("picture-name").textContent = `Chosen, ${side}: ${circle.querySelector("title").textContent}`;
    });
  }

  function filterAnswers() {
    const form = byId("filter");
    if (!form) return;
    const articles = [...document.querySelectorAll("#answer-list article")];
    const texts = articles.map((article) => article.textContent.toLowerCase());
    const field = (name) => form.elements.namedItem(name);
    const apply = () => {
      const text = field("text").value.trim().toLowerCase();
      let shown = 0;
      articles.forEach((article, index) => {
        const fits =
          ["set", "base", "edited"].every((name) => !field(name).value || article.dataset[name] === field(name).value) &&
          (!field("changed").checked || "changed" in article.dataset) &&
          texts[index].includes(text);
        article.hidden = !fits;
        shown += fits;
      });
      byId("filter-count").textContent = `${shown} of ${articles.length}`;
    };
    const reveal = () => {
      const target = location.hash.length > 1 && byId(decodeURIComponent(location.hash.slice(1)));
      if (!target || !articles.includes(target)) return;
      if (target.hidden) {
        form.reset();
        apply();
      }
      target.querySelector("details").open = true;
      target.scrollIntoView();
    };
    form.hidden = false;
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    addEventListener("hashchange", reveal);
    apply();
    reveal();
  }

  stepThroughLayers();
  filterAnswers();
})();
