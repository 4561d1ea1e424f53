{{- define "dashinfer.name" -}}
{{- /* never "dashinfer" alone: the variables that a service of that name brings would be taken for flags */ -}}
{{- printf "%s-vlm-server" .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "dashinfer.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "dashinfer.labels" -}}
{{ include "dashinfer.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}
