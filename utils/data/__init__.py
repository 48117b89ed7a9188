"""Data, from a row of text to a batch of ids.

    readers          rows of files (json, jsonl, csv, tsv, txt, parquet, arrow), of lists and of the datasets library
    splits           train and eval rows of a file, a folder, a saved dataset or the hub
    row_texts        texts of a row, or the reason why it cannot be used
    raw_datasets     the known datasets by name: which texts of a row are prompt, chosen, rejected
    own_files        users' own files by shape, and from a name or path to its dataset
    sources          what a step asks of its data, dataset by dataset
    split_index      which rows each step gets
    prompt_format    a conversation as text; special_tokens and chat_template_guard keep it safe
    text_encoder     text -> ids, and from a character to its token
    encoding         texts of a row -> ids of a row, by the rules of a step
    cache            id rows in memory-mapped Arrow files, named by their content
    preparation      all of it for one step: a DataRequest -> train and eval datasets
    unsupervised     plain text in blocks, for step 3
    batching         the order of rows, packing, padding, collators

data_utils has the published calls over them.
"""
