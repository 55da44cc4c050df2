element.addEventListener('click', event => {
  const point = event.target.closest('[data-candidate]');
  if (point) trigger('click', {candidate: point.dataset.candidate});
});
element.addEventListener('keydown', event => {
  const point = event.target.closest('[data-candidate]');
  if (point && (event.key === 'Enter' || event.key === ' ')) trigger('click', {candidate: point.dataset.candidate});
});
