// Package lint has the rules of the house as tests, so that a contributor needs
// no tool beyond Go to know that a change keeps them.
package lint
