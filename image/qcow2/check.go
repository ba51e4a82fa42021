package qcow2

import "context"

type Finding struct {
	Code    string
	Where   int64
	Message string
	Error   bool
}
type CheckOptions struct{}
type CheckResult struct{ Findings []Finding }

func (im *Image) check(ctx context.Context, o *CheckOptions) (*CheckResult, error) {
	return &CheckResult{}, nil
}
