{{- define "kunserve.selector" -}}
app.kubernetes.io/name: kunserve
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- define "kunserve.metadata" -}}
name: {{ .Release.Name }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "kunserve.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}
