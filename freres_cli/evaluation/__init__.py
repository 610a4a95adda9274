"""Questions with known answers, what is compared, results and accuracy with intervals; knows no model."""
