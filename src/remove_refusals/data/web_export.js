text => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'application/jsonl'}));
  link.download = 'talk.jsonl';
  link.click();
  URL.revokeObjectURL(link.href);
}
