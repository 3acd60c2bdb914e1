/* What scrolls can be reached by keyboard, and layout lists of signatures are no lists of terms. */
document.addEventListener("DOMContentLoaded", () => {
  const reach = () => {
    for (const box of document.querySelectorAll("article pre, article .table-wrapper, article .cell_output .output")) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  reach();
  addEventListener("resize", reach);
  for (const part of document.querySelectorAll("dt.sig dl, dt.sig dl > dd")) part.role = "presentation";
});
